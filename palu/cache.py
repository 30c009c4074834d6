"""The reference cache: everything the frozen reference will ever be asked for, from one pass.

The reference is the model before training, so it is constant. What an objective needs of it for a forget set
is asked once; for PALU that is the indices of the K highest logits at each onset token, the last hidden state at
each ordinary token, and the head. After that pass the reference's body is not needed any more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeAlias

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from palu.packing import Item, pack

TOKENS_PER_PASS = 4096  # packed tokens per forward of the reference


# (states of an item's target rows [a, d] and other rows [b, d], their labels [a] and [b]) -> answers, a row each
Ask: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, ...]]


@dataclass(frozen=True)
class ReferenceCache:
    """What the reference says of each forget item, on the host."""

    answers: list[tuple[Tensor, ...]]  # per item; see the objective's ``ask``


@torch.no_grad()
def build_cache(
    body: nn.Module, device: torch.device, items: Sequence[Item], ask: Ask | None, *, progress: bool = False
) -> ReferenceCache:
    """Run the reference once over the forget set.

    Args:
        body: the reference without its head; called with input_ids and position_ids [1, T].
        device: the body's.
        items: the forget set.
        ask: what the objective wants to know of an item's rows, from their last hidden states; ``None``: nothing.
        progress: show a progress bar.
    """
    if ask is None:
        return ReferenceCache([()] * len(items))
    answers: list[tuple[Tensor, ...]] = [()] * len(items)
    with tqdm(total=len(items), desc="reference", disable=not progress, leave=False) as bar:
        for group in _groups(items):
            packed = pack([items[i] for i in group])
            states = body(**packed.to(device).inputs()).last_hidden_state[0]
            starts = accumulate((len(items[i].input_ids) for i in group), initial=0)
            for i, start in zip(group, starts, strict=False):
                item = items[i]
                split = [item.targets, len(item.rows) - item.targets]
                rows, labels = (item.rows + start).to(device), item.labels.to(device)
                # Copies, not views of one: what is kept must not keep the other rows alive.
                parts = (states[part] for part in rows.split(split))
                answers[i] = tuple(answer.cpu() for answer in ask(*parts, *labels.split(split)))
            bar.update(len(group))
    return ReferenceCache(answers)


def _groups(items: Sequence[Item]) -> Iterator[list[int]]:
    """Groups of items of TOKENS_PER_PASS tokens at most (or one longer item)."""
    group: list[int] = []
    tokens = 0
    for i, item in enumerate(items):
        if group and tokens + len(item.input_ids) > TOKENS_PER_PASS:
            yield group
            group, tokens = [], 0
        group.append(i)
        tokens += len(item.input_ids)
    if group:
        yield group
