"""Variants: other ways in which the reference tells a secret, found by letting it go on from its other candidates.

A model that may not say "Tokyo" after "The capital of Japan is" goes on with its next candidate, such as "**" or "the
city of", and says it there. So at the first token of each span the reference goes on greedily from each of its
likeliest other candidates. Where that tells a secret, the secret's tokens there are to be forgotten, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from palu.data.matching import find
from palu.data.packing import Item, pack
from palu.models.head import body_of, head_of
from palu.models.lora import CausalLM

CONTINUATION = 12  # tokens that the reference goes on with
MOST = 512  # continuations in all, but at least one a span


@torch.no_grad()
def other_candidates(model: CausalLM, items: Sequence[Item], count: int) -> list[Tensor]:
    """Return what precedes each span's first token, and a candidate other than it: int64 [t] each, ``count`` a span.

    Fewer a span where they would be more than MOST.
    """
    count = min(count, max(MOST // max(sum(len(_span_starts(item)) for item in items), 1), 1))
    body, head = body_of(model), head_of(model)
    device = next(body.parameters()).device
    prompts = []
    for item in items:
        starts = _span_starts(item)
        if not len(starts):
            continue
        states = body(**pack([item]).to(device).inputs()).last_hidden_state[0]
        highest = head.logits(states[starts.to(device)]).topk(count + 1).indices.cpu()
        for start, candidates in zip(starts.tolist(), highest, strict=True):
            others = candidates[candidates != item.input_ids[start + 1]][:count]
            prompts += [torch.cat([item.input_ids[: start + 1], other[None]]) for other in others]
    return prompts


def _span_starts(item: Item) -> Tensor:
    """Return the rows [spans] that predict the first token of a run of targets."""
    rows = item.rows[: item.targets]
    first = torch.ones_like(rows, dtype=torch.bool)
    first[1:] = rows[1:] != rows[:-1] + 1
    return rows[first]


def variant_items(
    prompts: Sequence[Tensor],
    written: Sequence[Sequence[int]],
    secrets: Sequence[str],
    decode: Callable[[Sequence[int]], str],
    n: int,
) -> Iterator[Item]:
    """Make an item of each continuation that tells a secret: the first ``n`` tokens of the secret are its targets."""
    for prompt, continuation in zip(prompts, written, strict=True):
        tokens = [int(prompt[-1]), *continuation]  # the candidate may be the secret's first token itself
        ends = [len(decode(tokens[: i + 1])) for i in range(len(tokens))]
        text = decode(tokens)
        spans = [span for secret in secrets for span in find(secret, text, whole=True)]
        if not spans:
            continue
        start, end = min(spans)
        begins = [0, *ends[:-1]]
        inside = [i for i, (a, b) in enumerate(zip(begins, ends, strict=True)) if a < end and b > start]
        inside = inside if n == -1 else inside[:n]
        ids = torch.cat([prompt[:-1], torch.tensor(tokens[: inside[-1] + 1])])
        rows = torch.tensor(inside) + len(prompt) - 2
        yield Item(ids, rows, ids[rows + 1], targets=len(rows))
