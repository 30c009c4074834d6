"""Pack many examples into one sequence without padding, and keep which positions of it have a role.

The body of the model runs once over ``input_ids`` [1, T] with ``position_ids`` that restart at each
example, so attention never crosses examples. Position t-1 of an example predicts its token t: a *row*
below is a position of the packed sequence whose hidden state predicts a token that has a role.
"""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from palu.data.ragged import Ragged, RaggedSequence
from palu.data.tokenize import IGNORE, ORDINARY, Example
from palu.ops import prefix_mask

LEAST_SHARED = 8  # tokens of a shared prefix; a mask for each example costs more than fewer save


@dataclass(frozen=True)
class Item:
    """One example (two, where a method compares answers) with the positions that predict a token with a role."""

    input_ids: Tensor  # int64 [t]
    rows: Tensor  # int64 [r]: positions, ascending within each role: targets, then others
    targets: int = 0  # how many of ``rows`` predict a token to forget
    lengths: tuple[int, ...] = ()  # of the examples in ``input_ids``; empty: it is one
    start: int = 0  # the row that predicts the answer's first token; kept for what is to be forgotten alone

    @property
    def labels(self) -> Tensor:
        """The true tokens that the rows predict, int64 [r]."""
        return self.input_ids[self.rows + 1]


class Items(RaggedSequence[Item]):
    """Many items, each made when it is asked for: 4 bytes for each token and row with a role, and 40 for each item."""

    def __init__(self, items: Iterable[Item] = ()):
        self.input_ids, self.rows, self.example_lengths = Ragged(), Ragged(), Ragged()
        self._targets, self._starts = array("q"), array("q")
        for item in items:
            self.input_ids.append(item.input_ids)
            self.rows.append(item.rows)
            self.example_lengths.append(item.lengths)
            self._targets.append(item.targets)
            self._starts.append(item.start)

    @classmethod
    def of(cls, items: Sequence[Item]) -> Items:
        """Return these, or make them of others."""
        return items if isinstance(items, Items) else cls(items)

    def make(self, i: int) -> Item:
        lengths = tuple(self.example_lengths[i].tolist())
        return Item(self.input_ids[i], self.rows[i], self._targets[i], lengths, self._starts[i])

    def __len__(self) -> int:
        return len(self._targets)

    @property
    def tokens(self) -> Tensor:
        """The tokens of each item, int64 [items]."""
        return self.input_ids.lengths()

    @property
    def targets(self) -> Tensor:
        """How many rows of each item predict a token to forget, int64 [items]."""
        return torch.tensor(self._targets, dtype=torch.int64)

    @property
    def others(self) -> Tensor:
        """How many other rows each item has, int64 [items]."""
        return self.rows.lengths() - self.targets

    def longest(self) -> int:
        """Return the tokens of the longest example; 0 without any."""
        alone = self.tokens[self.example_lengths.lengths() == 0].tolist()
        return max([*self.example_lengths.values, *alone], default=0)

    def flat(self) -> list[Any]:
        """Return all that is in them, as a few long tensors, for a hash."""
        starts = torch.tensor(self._starts, dtype=torch.int64)
        return [*self.input_ids.flat(), *self.rows.flat(), *self.example_lengths.flat(), self.targets, starts]


def forget_items(
    examples: Sequence[Example],
    n: int,
    eos_token_id: int | None,
    *,
    onset: bool = True,
    most_ordinary: int | None = None,
    seed: int = 0,
) -> Items:
    """Make items with the onset tokens (first ``n`` of each span) as targets and the ordinary tokens as others.

    ``most_ordinary``: ordinary tokens per example, drawn by ``seed`` where there are more; None: all.
    """
    generator = torch.Generator().manual_seed(seed)

    def item(example: Example) -> Item:
        mask = prefix_mask(example.labels[None], n, eos_token_id)[0, 1:]
        targets = mask.nonzero().squeeze(-1) if onset else mask.new_empty(0, dtype=torch.int64)
        ordinary = (example.labels[1:] == ORDINARY).nonzero().squeeze(-1)
        if most_ordinary is not None and len(ordinary) > most_ordinary:
            drawn = torch.randperm(len(ordinary), generator=generator)[:most_ordinary]
            ordinary = ordinary[drawn.sort().values]
        rows, start = torch.cat([targets, ordinary]), example.answer_start - 1
        return Item(example.input_ids, rows, len(targets), start=start)

    return Items(map(item, examples))


def answer_items(examples: Iterable[Example]) -> Items:
    """Make items with every token of the answer as a target, end of sequence included."""
    return Items(replace(item, targets=len(item.rows)) for item in retain_items(examples))


def retain_items(examples: Iterable[Example]) -> Items:
    """Make items with every token of the answer as an other, end of sequence included."""
    return Items(Item(example.input_ids, _answer_rows(example)) for example in examples)


def pair_items(examples: Sequence[Example], alternates: Sequence[Example]) -> Items:
    """Make items of two answers each: tokens of the first are targets, those of the alternate are others."""

    def pair(lose: Example, win: Example) -> Item:
        lengths, targets = (len(lose.input_ids), len(win.input_ids)), _answer_rows(lose)
        rows = torch.cat([targets, _answer_rows(win) + lengths[0]])
        return Item(torch.cat([lose.input_ids, win.input_ids]), rows, len(targets), lengths)

    return Items(pair(*both) for both in zip(examples, alternates, strict=True))


def anchor_item(input_ids: Tensor, start: int) -> Item:
    """Make an anchor's item: the answer's tokens, from ``start`` on, are others."""
    return Item(input_ids, torch.arange(start - 1, len(input_ids) - 1))


def _answer_rows(example: Example) -> Tensor:
    return (example.labels[1:] != IGNORE).nonzero().squeeze(-1)


@dataclass(frozen=True)
class Packed:
    """Examples laid end to end in one sequence of T tokens, positions restarting at each.

    One of them, the leader, may hold a prefix that others share: these are laid without it, and go on from the leader's
    tokens. Each example may share another length of it.
    """

    input_ids: Tensor  # int64 [1, T]
    position_ids: Tensor  # int64 [1, T]
    cu_seq_lens: Tensor  # int32 [examples + 1]: where each example begins, and T
    sequence_lengths: tuple[int, ...]  # of each example, without its shared prefix
    shared_lengths: tuple[int, ...]  # of each example's shared prefix; 0: it has none, as the leader
    leader: int = 0  # its number

    @property
    def tokens(self) -> int:
        """Tokens of the examples; a shared prefix counts for each."""
        return sum(self.sequence_lengths) + sum(self.shared_lengths)

    def to(self, device: torch.device) -> Packed:
        """Copy it to a device; copies from pinned memory do not block."""
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
            "shared_lengths": self.shared_lengths,
            "leader": self.leader,
        }

    def rows(self, items: Sequence[Item]) -> list[Tensor]:
        """Return each item's rows as positions of the packed sequence, for the items that were packed."""
        starts = [*accumulate(self.sequence_lengths, initial=0)]
        numbers = iter(range(len(self.sequence_lengths)))
        found = []
        for item in items:
            assert bool((item.rows >= 0).all()), "nothing predicts a text's first token"
            rows, begin = item.rows.clone(), 0  # of an example in the item
            for length in _lengths(item):
                number = next(numbers)
                place, shared = item.rows - begin, self.shared_lengths[number]
                there = torch.where(place < shared, starts[self.leader] + place, starts[number] + place - shared)
                rows = torch.where((place >= 0) & (place < length), there, rows)
                begin += length
            found.append(rows)
        return found


def pack(items: Sequence[Item], *, share_prefix: bool = False) -> Packed:
    """Pack examples end to end.

    ``share_prefix``: a shared prefix, such as a chat template's system prompt, comes once; see
    :func:`palu.models.attention.shares_prefix`.
    """
    examples = [part for item in items for part in item.input_ids.split(_lengths(item))]
    leader, shared = _shared_prefixes(examples) if share_prefix else (0, [0] * len(examples))
    parts = [example[skip:] for example, skip in zip(examples, shared, strict=True)]
    lengths = tuple(map(len, parts))
    return Packed(
        torch.cat(parts)[None],
        torch.cat([torch.arange(skip, len(example)) for example, skip in zip(examples, shared, strict=True)])[None],
        torch.tensor((0, *accumulate(lengths)), dtype=torch.int32),
        lengths,
        tuple(shared),
        leader,
    )


def _shared_prefixes(examples: Sequence[Tensor]) -> tuple[int, list[int]]:
    """Choose as leader the example of which the others share most; return it and the length of each shared prefix.

    Each keeps a token of its own, and the leader all; fewer than LEAST_SHARED are not shared.
    """
    padded = pad_sequence(list(examples), batch_first=True, padding_value=-1)
    places, lengths = torch.arange(padded.shape[1]), torch.tensor([len(example) for example in examples])
    own = places < lengths[:, None] - 1
    common = torch.stack([((padded == one) & own).cumprod(1).sum(1) for one in padded])  # [leader, example]
    common = common.fill_diagonal_(0).where(common >= LEAST_SHARED, 0)
    leader = int(common.sum(1).argmax())
    return leader, common[leader].tolist()


def split_roles(parts: Sequence[Tensor], items: Sequence[Item]) -> tuple[list[Tensor], list[Tensor]]:
    """Split what stands for each item's rows, such as their labels, into that of its targets and of its others."""
    by_item = list(zip(parts, items, strict=True))
    return [part[: item.targets] for part, item in by_item], [part[item.targets :] for part, item in by_item]


def _lengths(item: Item) -> list[int]:
    """Return the lengths of the examples in an item."""
    return list(item.lengths) or [len(item.input_ids)]


class Counts(NamedTuple):
    """How many rows and examples a micro-batch has, or a whole optimisation step: the denominators of all means."""

    targets: int  # rows that predict a token to forget
    others: int  # the other rows of forget items and anchors
    retain: int  # rows of retain examples
    examples: int  # forget items and anchors


@dataclass(frozen=True)
class Batch:
    """Forget and retain examples in one packed sequence, with what the losses need."""

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
