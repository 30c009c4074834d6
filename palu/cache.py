"""The reference cache: everything the frozen reference will ever be asked for, from one pass.

The reference is the model before training, so it is constant. What an objective needs of it for a forget set
is asked once; for PALU that is the indices of the K highest logits at each onset token, the last hidden state at
each ordinary token, and the head. After that pass the reference's body is not needed any more. The answers are kept in
memory, or in a file that outlives the run (:mod:`palu.cache_file`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeAlias, overload

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from palu.cache_file import CacheFile, Write
from palu.packing import Item, anchor, pack

TOKENS_PER_PASS = 4096  # packed tokens per forward of the reference


# (states of target rows [a, d] and other rows [b, d] of any items, their labels [a] and [b]) -> answers: each has a row
# for every target row, or for every other row, which depends on that row alone
Ask: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, ...]]


class Answers(Sequence[tuple[Tensor, ...]]):
    """The answers for each item, as views of tensors that hold those of all items end to end.

    Args:
        tensors: one for each kind of answer.
        of_targets: whether its rows are the items' target rows, or their other rows.
        items: the forget set.
    """

    def __init__(self, tensors: Sequence[Tensor], of_targets: Sequence[bool], items: Sequence[Item]):
        self.tensors = tensors
        of_target, of_other = ([0, *accumulate(counts)] for counts in zip(*map(_split, items), strict=True))
        self.starts = [of_target if targets else of_other for targets in of_targets]
        self.items = len(items)

    def __len__(self) -> int:
        return self.items

    @overload
    def __getitem__(self, i: int) -> tuple[Tensor, ...]: ...
    @overload
    def __getitem__(self, i: slice) -> list[tuple[Tensor, ...]]: ...
    def __getitem__(self, i: int | slice) -> tuple[Tensor, ...] | list[tuple[Tensor, ...]]:
        """Of an item: [rows, ...] each; or of several."""
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        i = range(len(self))[i]
        return tuple(
            tensor[starts[i] : starts[i + 1]] for tensor, starts in zip(self.tensors, self.starts, strict=True)
        )


@dataclass(frozen=True)
class ReferenceCache:
    """What the reference says of each forget item, and of each anchor, on the host."""

    answers: Sequence[tuple[Tensor, ...]]  # per item, then per anchor; see the objective's ``ask``
    anchors: Sequence[Item] = ()  # what it wrote itself; see :mod:`palu.anchors`


def read_cache(file: CacheFile, items: Sequence[Item]) -> ReferenceCache | None:
    """The answers that the file holds, mapped into memory; None where there is no file yet."""
    if (known := file.read()) is None:
        return None
    tensors, about = known
    anchors = [anchor(torch.tensor(ids), start) for ids, start in about["anchors"]]
    return ReferenceCache(Answers(tensors, about["of_targets"], [*items, *anchors]), anchors)


@torch.no_grad()
def build_cache(
    body: nn.Module,
    device: torch.device,
    items: Sequence[Item],
    ask: Ask | None,
    *,
    anchors: Sequence[Item] = (),
    file: CacheFile | None = None,
    progress: bool = False,
) -> ReferenceCache:
    """Run the reference once over the forget set and the anchors.

    Args:
        body: the reference without its head; called with input_ids and position_ids [1, T].
        device: the body's.
        items: the forget set.
        anchors: what it is asked about, too.
        ask: what the objective wants to know of an item's rows, from their last hidden states; ``None``: nothing.
        file: where the answers are written to, and then mapped from; one that has been written in the meantime is
            taken as it is. ``None``: they stay in memory.
        progress: show a progress bar.

    Raises:
        CacheError: the file cannot be written or read.
    """
    if ask is None:
        return ReferenceCache([()] * len(items))
    with file.locked(progress=progress) if file is not None else nullcontext():
        if file is not None and (known := read_cache(file, items)) is not None:
            return known
        both = [*items, *anchors]
        asked = _ask(body, device, both, ask, progress)
        kinds = next(asked)
        like, of_targets = [kind[:0].cpu() for kind in kinds], [len(kind) == 1 for kind in kinds]
        of_target, of_other = map(sum, zip(*map(_split, both), strict=True))
        lengths = [of_target if targets else of_other for targets in of_targets]
        if file is None:
            tensors = [empty.new_empty(n, *empty.shape[1:]) for empty, n in zip(like, lengths, strict=True)]
            _fill(lambda kind, row, rows: tensors[kind][row : row + len(rows)].copy_(rows), asked, len(kinds))
            return ReferenceCache(Answers(tensors, of_targets, both), anchors)
        kept = [(item.input_ids.tolist(), int(item.rows[0]) + 1) for item in anchors]
        with file.writing(like, lengths, {"of_targets": of_targets, "anchors": kept}) as write:
            _fill(write, asked, len(kinds))
        written = read_cache(file, items)
        assert written is not None
        return written


def _split(item: Item) -> tuple[int, int]:
    """How many target rows and other rows an item has."""
    return item.targets, len(item.rows) - item.targets


def _ask(
    body: nn.Module, device: torch.device, items: Sequence[Item], ask: Ask, progress: bool
) -> Iterator[tuple[Tensor, ...]]:
    """First those to one target row and no other, which tell their kinds; then all, for a few items at a time."""
    with tqdm(total=len(items), desc="reference", disable=not progress, leave=False) as bar:
        for number, group in enumerate(_groups(items)):
            packed = pack(group)
            states = body(**packed.to(device).inputs()).last_hidden_state[0]
            starts = accumulate((len(item.input_ids) for item in group), initial=0)
            rows = [(item.rows + start).split(_split(item)) for item, start in zip(group, starts, strict=False)]
            labels = [item.labels.split(_split(item)) for item in group]
            targets, others = (torch.cat(parts).to(device) for parts in zip(*rows, strict=True))
            target_labels, other_labels = (torch.cat(parts).to(device) for parts in zip(*labels, strict=True))
            if number == 0:
                any_label = packed.input_ids[0, :1].to(device)
                yield ask(states[:1], states[:0], any_label, any_label[:0])
            yield ask(states[targets], states[others], target_labels, other_labels)
            bar.update(len(group))


def _fill(write: Write, asked: Iterator[tuple[Tensor, ...]], kinds: int) -> None:
    """Write answers as they come, each kind's rows after those before."""
    done = [0] * kinds
    for answers in asked:
        for kind, rows in enumerate(answers):
            write(kind, done[kind], rows)
            done[kind] += len(rows)


def _groups(items: Sequence[Item]) -> Iterator[list[Item]]:
    """Groups of items of TOKENS_PER_PASS tokens at most (or one longer item)."""
    group: list[Item] = []
    tokens = 0
    for item in items:
        if group and tokens + len(item.input_ids) > TOKENS_PER_PASS:
            yield group
            group, tokens = [], 0
        group.append(item)
        tokens += len(item.input_ids)
    if group:
        yield group
