"""The reference cache: everything the frozen reference will ever be asked for, from one pass.

The reference is the model before training, so it is constant. For a forget set, what the losses need of
it is: at each onset token the indices of its K highest logits, at each ordinary token its last hidden
state, and its head. After that pass the reference's body is not needed any more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from palu.losses import Head
from palu.packing import Item, pack

TOKENS_PER_PASS = 4096  # packed tokens per forward of the reference


@dataclass(frozen=True)
class ReferenceCache:
    """What the reference says of each forget item, on the host."""

    index: list[Tensor]  # per item, int32 [onset, K]
    hidden: list[Tensor]  # per item, [ordinary, d]


@torch.no_grad()
def build_cache(
    body: nn.Module,
    head: Head,
    items: Sequence[Item],
    *,
    top_k: int,
    chunk_bytes: int,
    progress: bool = False,
) -> ReferenceCache:
    """Run the reference once over the forget set.

    Args:
        body: the reference without its head; called with input_ids and position_ids [1, T].
        head: the reference's head, on the body's device.
        items: the forget set (:func:`palu.packing.forget_items`).
        top_k: K, clamped to the vocabulary.
        chunk_bytes: bound on the logits held at once.
        progress: show a progress bar.
    """
    device = head.weight.device
    vocab_size = head.weight.shape[0]
    chunk_rows = max(chunk_bytes // (vocab_size * head.weight.element_size()), 1)
    index: list[Tensor] = [torch.empty(0)] * len(items)
    hidden: list[Tensor] = [torch.empty(0)] * len(items)

    with tqdm(total=len(items), desc="reference", disable=not progress, leave=False) as bar:
        for group in _groups(items):
            packed = pack([items[i] for i in group])
            states = body(**packed.to(device).inputs()).last_hidden_state[0]
            for i, start in zip(group, packed.cu_seq_lens.tolist()[:-1], strict=True):
                rows = (items[i].rows + start).to(device)
                # Two copies, not two views of one: what is kept must not keep the onset rows alive.
                onset, ordinary = states[rows[: items[i].onset]], states[rows[items[i].onset :]]
                top = [
                    F.linear(chunk, *head).topk(min(top_k, vocab_size), dim=-1, sorted=False).indices.int()
                    for chunk in onset.split(chunk_rows)
                ]
                index[i], hidden[i] = torch.cat(top).cpu(), ordinary.cpu()
            bar.update(len(group))
    return ReferenceCache(index, hidden)


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
