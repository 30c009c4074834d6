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
    """What enters a step together, with the positions that predict a token with a role.

    That is one example; or two, where a method compares two answers.
    """

    input_ids: Tensor  # int64 [t]
    rows: Tensor  # int64 [r]: positions, ascending within each role: targets, then others
    labels: Tensor  # int64 [r]: the true tokens
    targets: int = 0  # how many of ``rows`` predict a token to forget
    lengths: tuple[int, ...] = ()  # of the examples in ``input_ids``; empty: it is one


def forget_items(examples: Sequence[Example], n: int, eos_token_id: int | None) -> list[Item]:
    """Targets: the onset tokens (first ``n`` of each span). Others: ordinary tokens. Redundant tokens have no row."""
    padded = torch.nn.utils.rnn.pad_sequence([e.labels for e in examples], batch_first=True, padding_value=IGNORE)
    onset_mask = ops.prefix_mask(padded, n, eos_token_id)
    items = []
    for example, mask in zip(examples, onset_mask, strict=True):
        onset = mask[1 : len(example.labels)].nonzero().squeeze(-1)
        ordinary = (example.labels[1:] == ORDINARY).nonzero().squeeze(-1)
        rows = torch.cat([onset, ordinary])
        items.append(Item(example.input_ids, rows, example.input_ids[rows + 1], targets=len(onset)))
    return items


def answer_items(examples: Sequence[Example]) -> list[Item]:
    """Targets: every token of the answer, end-of-sequence included."""
    items = []
    for example in examples:
        rows = (example.labels[1:] != IGNORE).nonzero().squeeze(-1)
        items.append(Item(example.input_ids, rows, example.input_ids[rows + 1], targets=len(rows)))
    return items


def pair_items(examples: Sequence[Example], alternates: Sequence[Example]) -> list[Item]:
    """Targets: the tokens of the first one's answer. Others: those of the second one's."""
    items = []
    for lose, win in zip(answer_items(examples), answer_items(alternates), strict=True):
        lengths = len(lose.input_ids), len(win.input_ids)
        items.append(
            Item(
                torch.cat([lose.input_ids, win.input_ids]),
                torch.cat([lose.rows, win.rows + lengths[0]]),
                torch.cat([lose.labels, win.labels]),
                lose.targets,
                lengths,
            )
        )
    return items


def retain_items(examples: Sequence[Example]) -> list[Item]:
    """Others: every token of the answer, end-of-sequence included."""
    return [dataclasses.replace(item, targets=0) for item in answer_items(examples)]


def anchor(input_ids: Tensor, start: int) -> Item:
    """Others: the answer's tokens, from ``start`` on."""
    rows = torch.arange(start - 1, len(input_ids) - 1)
    return Item(input_ids, rows, input_ids[rows + 1])


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
    lengths = tuple(length for item in items for length in item.lengths or (len(item.input_ids),))
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
    rows: Tensor  # int64 [targets + others + retain], in this order
    labels: Tensor  # int64, as rows: the true tokens
    item: Tensor  # int64 [targets + others]: which forget item (or anchor) of the batch a row belongs to
    reference: tuple[Tensor, ...]  # what the objective asked the reference of them, item after item
    counts: tuple[int, int, int, int]  # rows of targets, others and retain; forget items and anchors

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
    if isinstance(value, tuple) and value and isinstance(value[0], Tensor):
        return tuple(map(function, value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return type(value)(*(_map(function, getattr(value, field.name)) for field in dataclasses.fields(value)))
    return value
