"""Packing: many examples in one row without padding, and which positions of it have a role.

The body of the model runs once over ``input_ids`` [1, T] with ``position_ids`` that restart at each
example, so attention never crosses examples. Position t-1 of an example predicts its token t: a *row*
below is a position of the packed row whose hidden state predicts a token that has a role.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from palu import ops
from palu.data import IGNORE, ORDINARY, Example


@dataclass(frozen=True)
class Item:
    """One example, with the positions that predict a token with a role."""

    input_ids: Tensor  # int64 [t]
    rows: Tensor  # int64 [r]: positions, ascending within each role: onset, then ordinary or retain
    labels: Tensor  # int64 [onset or retain]: the true tokens
    onset: int = 0  # how many of ``rows`` are onset rows


def forget_items(examples: Sequence[Example], n: int, eos_token_id: int | None) -> list[Item]:
    """Onset rows (first ``n`` tokens of each span), then ordinary rows; redundant tokens have no row."""
    padded = torch.nn.utils.rnn.pad_sequence([e.labels for e in examples], batch_first=True, padding_value=IGNORE)
    onset_mask = ops.prefix_mask(padded, n, eos_token_id)
    items = []
    for example, mask in zip(examples, onset_mask, strict=True):
        onset = mask[1 : len(example.labels)].nonzero().squeeze(-1)
        ordinary = (example.labels[1:] == ORDINARY).nonzero().squeeze(-1)
        items.append(
            Item(
                example.input_ids,
                torch.cat([onset, ordinary]),
                example.input_ids[onset + 1],
                onset=len(onset),
            )
        )
    return items


def retain_items(examples: Sequence[Example]) -> list[Item]:
    """Every answer token, end-of-sequence included, is predicted by a row."""
    items = []
    for example in examples:
        rows = (example.labels[1:] != IGNORE).nonzero().squeeze(-1)
        items.append(Item(example.input_ids, rows, example.labels[rows + 1]))
    return items


@dataclass(frozen=True)
class Packed:
    """Examples laid end to end in one row of T tokens, positions restarting at each."""

    input_ids: Tensor  # int64 [1, T]
    position_ids: Tensor  # int64 [1, T]
    cu_seq_lens: Tensor  # int32 [examples + 1]: where each example begins, and T
    sequence_lengths: tuple[int, ...]

    def to(self, device: torch.device) -> Packed:
        """The row on another device; copies from pinned memory do not block."""
        return _map(lambda tensor: tensor.to(device, non_blocking=True), self)

    def inputs(self) -> dict[str, Any]:
        """Keyword arguments for the body of a transformers model, whichever its attention."""
        longest = max(self.sequence_lengths)
        return {
            "input_ids": self.input_ids,
            "position_ids": self.position_ids,
            "use_cache": False,  # with it, transformers would let examples attend to each other
            "cu_seq_lens_q": self.cu_seq_lens,
            "cu_seq_lens_k": self.cu_seq_lens,
            "max_length_q": longest,
            "max_length_k": longest,
            "sequence_lengths": self.sequence_lengths,
        }


def pack(items: Sequence[Item]) -> Packed:
    """Lay examples end to end."""
    lengths = tuple(len(item.input_ids) for item in items)
    return Packed(
        torch.cat([item.input_ids for item in items])[None],
        torch.cat([torch.arange(length) for length in lengths])[None],
        torch.tensor((0, *accumulate(lengths)), dtype=torch.int32),
        lengths,
    )


@dataclass(frozen=True)
class Batch:
    """Forget and retain examples in one packed row, with what the losses need."""

    packed: Packed
    rows: Tensor  # int64 [onset + ordinary + retain], in this order
    onset_labels: Tensor  # int64 [onset]: the true tokens
    retain_labels: Tensor  # int64 [retain]
    index: Tensor  # int32 [onset, K]: the reference's top K
    ref_hidden: Tensor  # [ordinary, d]: the reference's last hidden states

    @property
    def counts(self) -> tuple[int, int, int]:
        """Tokens of each role: (onset, ordinary, retain)."""
        return len(self.onset_labels), len(self.ref_hidden), len(self.retain_labels)

    def to(self, device: torch.device) -> Batch:
        """The batch on another device; copies from pinned memory do not block."""
        return _map(lambda tensor: tensor.to(device, non_blocking=True), self)

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory."""
        return _map(Tensor.pin_memory, self)


def _map(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Apply a function to every tensor of a (nested) dataclass."""
    if isinstance(value, Tensor):
        return function(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return type(value)(*(_map(function, getattr(value, field.name)) for field in dataclasses.fields(value)))
    return value
