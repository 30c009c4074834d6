"""Pack many examples into one row without padding, and keep which positions of it have a role.

The body of the model runs once over ``input_ids`` [1, T] with ``position_ids`` that restart at each
example, so attention never crosses examples. Position t-1 of an example predicts its token t: a *row*
below is a position of the packed row whose hidden state predicts a token that has a role.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from palu.data.tokenize import IGNORE, ORDINARY, Example
from palu.ops import prefix_mask


@dataclass(frozen=True)
class Item:
    """One example (two, where a method compares answers) with the positions that predict a token with a role."""

    input_ids: Tensor  # int64 [t]
    rows: Tensor  # int64 [r]: positions, ascending within each role: targets, then others
    labels: Tensor  # int64 [r]: the true tokens
    targets: int = 0  # how many of ``rows`` predict a token to forget
    lengths: tuple[int, ...] = ()  # of the examples in ``input_ids``; empty: it is one


def forget_items(examples: Sequence[Example], n: int, eos_token_id: int | None) -> list[Item]:
    """Make items with the onset tokens (first ``n`` of each span) as targets and the ordinary tokens as others."""
    padded = torch.nn.utils.rnn.pad_sequence([e.labels for e in examples], batch_first=True, padding_value=IGNORE)
    onset_mask = prefix_mask(padded, n, eos_token_id)
    items = []
    for example, mask in zip(examples, onset_mask, strict=True):
        onset = mask[1 : len(example.labels)].nonzero().squeeze(-1)
        ordinary = (example.labels[1:] == ORDINARY).nonzero().squeeze(-1)
        rows = torch.cat([onset, ordinary])
        items.append(Item(example.input_ids, rows, example.input_ids[rows + 1], targets=len(onset)))
    return items


def answer_items(examples: Sequence[Example]) -> list[Item]:
    """Make items with every token of the answer as a target, end of sequence included."""
    items = []
    for example in examples:
        rows = (example.labels[1:] != IGNORE).nonzero().squeeze(-1)
        items.append(Item(example.input_ids, rows, example.input_ids[rows + 1], targets=len(rows)))
    return items


def pair_items(examples: Sequence[Example], alternates: Sequence[Example]) -> list[Item]:
    """Make items of two answers each: tokens of the first are targets, those of the alternate are others."""
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
    """Make items with every token of the answer as an other, end of sequence included."""
    return [dataclasses.replace(item, targets=0) for item in answer_items(examples)]


def anchor_item(input_ids: Tensor, start: int) -> Item:
    """Make an anchor's item: the answer's tokens, from ``start`` on, are others."""
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
        """Copy the row to a device; copies from pinned memory do not block."""
        return _map(lambda tensor: tensor.to(device, non_blocking=True), self)

    def inputs(self) -> dict[str, Any]:
        """Return the keyword arguments for the body of a transformers model, whichever its attention."""
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
    """Pack examples end to end."""
    lengths = tuple(length for item in items for length in item.lengths or (len(item.input_ids),))
    return Packed(
        torch.cat([item.input_ids for item in items])[None],
        torch.cat([torch.arange(length) for length in lengths])[None],
        torch.tensor((0, *accumulate(lengths)), dtype=torch.int32),
        lengths,
    )


class Counts(NamedTuple):
    """How many rows and examples a micro-batch has, or a whole optimisation step: the denominators of all means."""

    targets: int  # rows that predict a token to forget
    others: int  # the other rows of forget items and anchors
    retain: int  # rows of retain examples
    examples: int  # forget items and anchors


@dataclass(frozen=True)
class Batch:
    """Forget and retain examples in one packed row, with what the losses need."""

    packed: Packed
    rows: Tensor  # int64 [targets + others + retain], in this order
    labels: Tensor  # int64, as rows: the true tokens
    item: Tensor  # int64 [targets + others]: which forget item (or anchor) of the batch a row belongs to
    reference: dict[str, Tensor]  # the method's reference fields of these items, item after item
    counts: Counts

    def to(self, device: torch.device) -> Batch:
        """Copy the batch to a device; copies from pinned memory do not block."""
        return _map(lambda tensor: tensor.to(device, non_blocking=True), self)

    def pin_memory(self) -> Batch:
        """Copy the batch to page-locked memory."""
        return _map(Tensor.pin_memory, self)


def _map(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Apply a function to every tensor of a nested dataclass."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {name: function(tensor) for name, tensor in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return type(value)(*(_map(function, getattr(value, field.name)) for field in dataclasses.fields(value)))
    return value
