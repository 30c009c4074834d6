"""Variants: other ways in which the reference tells a secret, found by letting it go on from its other candidates.

A model that may not say "Tokyo" after "The capital of Japan is" goes on with its next candidate, such as "**" or "the
city of", and says it there. So at the first token of each span the reference goes on greedily from each of its
likeliest other candidates. Where that tells a secret, the secret's tokens there are to be forgotten, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from palu.data.matching import find
from palu.data.packing import Item, pack
from palu.models.head import body_of, head_of
from palu.models.lora import CausalLM

CONTINUATION = 12  # tokens that the reference goes on with
PER_SPAN = 3  # variants, those of the likeliest candidates
MOST = 512  # continuations in all, but at least one a span


@torch.no_grad()
def other_candidates(model: CausalLM, items: Sequence[Item], count: int) -> list[tuple[Tensor, Tensor]]:
    """Return (the tokens before a span and another candidate for its first one, the span's targets), int64 each.

    There are ``count`` for each span, fewer where they would be more than MOST.
    """
    count = min(count, max(MOST // max(sum(len(_spans(item)) for item in items), 1), 1))
    body, head = body_of(model), head_of(model)
    device = next(body.parameters()).device
    found = []
    for item in items:
        if not (spans := _spans(item)):
            continue
        states = body(**pack([item]).to(device).inputs()).last_hidden_state[0]
        rows = torch.stack([span[0] for span in spans])
        highest = head.logits(states[rows.to(device)]).topk(count + 1).indices.cpu()
        for span, candidates in zip(spans, highest, strict=True):
            targets = item.input_ids[span + 1]
            for other in candidates[candidates != targets[0]][:count]:
                found.append((torch.cat([item.input_ids[: span[0] + 1], other[None]]), targets))
    return found


def _spans(item: Item) -> list[Tensor]:
    """Split the rows that predict targets into runs of neighbours."""
    rows = item.rows[: item.targets]
    if not len(rows):
        return []
    return list(rows.tensor_split(((rows[1:] != rows[:-1] + 1).nonzero()[:, 0] + 1).tolist()))


def variant_item(
    prompt: Tensor,
    continuation: Sequence[int],
    targets: Tensor,
    secrets: Sequence[str],
    decode: Callable[[Sequence[int]], str],
    n: int,
) -> Item | None:
    """Make an item where a continuation tells the span's secret, whose first ``n`` tokens are its targets; else None.

    Args:
        prompt, targets: of :func:`other_candidates`.
        secrets: those of the forget set; the span's is the one that begins as its targets do.
        decode: turns tokens into text.
    """
    tokens = [int(prompt[-1]), *continuation]  # the candidate may be the secret's first token itself
    begins = decode(targets.tolist()).strip()
    text, own = decode(tokens), [secret for secret in secrets if secret.startswith(begins) or begins.startswith(secret)]
    places = [place for secret in own for place in find(secret, text, whole=True)]
    if not places:
        return None
    start, end = min(places)
    edges = [0, *(len(decode(tokens[: i + 1])) for i in range(len(tokens)))]
    inside = [i for i, (a, b) in enumerate(pairwise(edges)) if a < end and b > start]
    inside = inside if n == -1 else inside[:n]
    ids = torch.cat([prompt[:-1], torch.tensor(tokens[: inside[-1] + 1])])
    rows = torch.tensor(inside) + len(prompt) - 2
    return Item(ids, rows, ids[rows + 1], targets=len(rows))
