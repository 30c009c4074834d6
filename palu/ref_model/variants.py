"""Variants: other ways in which the reference tells a secret, found by letting it go on from its other candidates.

A model that may not say "Tokyo" after "The capital of Japan is" goes on with its next candidate, such as "**" or "the
city of", and says it there; or it begins its answer in other words, "Tokyo is". So the reference answers each
question greedily in its own words; at the first token of each answer and of each span it goes on from each of its
likeliest other candidates; it goes on with the answer's words before each span where no question was asked; and it
answers paraphrases of the question, which it has written itself (:mod:`palu.ref_model.neighbours`). Where that tells a
secret of the same row that does not stand before it already, the secret's tokens there are to be forgotten, too; and
from the likeliest other candidate for the first of them the reference goes on once more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from palu.data.matching import find, stands_in
from palu.data.packing import Item, pack
from palu.models.head import body_of, head_of
from palu.models.lora import CausalLM

CONTINUATION = 20  # tokens that the reference goes on with
PER_PLACE = 3  # variants, those of the likeliest candidates
MOST = 512  # continuations of each kind, but at least one a place


class Beginning(NamedTuple):
    """The beginning of an answer, from which the reference is to go on."""

    prompt: Tensor  # int64 [t]: the tokens before a place, and a candidate for its token; or a question
    targets: list[Tensor]  # int64 [span] each, of the spans to be told from there
    row: Tensor | None  # int64: the row or variant that it comes from, which is no new one


@torch.no_grad()
def other_candidates(
    model: CausalLM, items: Sequence[Item], count: int, *, own_answer: bool = False
) -> list[Beginning]:
    """Choose the beginnings of variants: other candidates where an answer or a span begins.

    There are ``count`` for each of these places, fewer where they would be more than MOST. ``own_answer``: where an
    answer begins its own first token is one more, since the reference may go on from there in other words.
    """
    count = min(count, max(MOST // max(sum(len(_places(item)) for item in items), 1), 1))
    body, head = body_of(model), head_of(model)
    device = next(body.parameters()).device
    found = []
    for item in items:
        if not (places := _places(item)):
            continue
        states = body(**pack([item]).to(device).inputs()).last_hidden_state[0]
        rows = torch.tensor(list(places))
        highest = head.logits(states[rows.to(device)]).topk(count + 1).indices.cpu()
        for (row, spans), candidates in zip(places.items(), highest, strict=True):
            own, targets = item.input_ids[row + 1], [item.input_ids[span + 1] for span in spans]
            others = candidates[candidates != own][:count].tolist()
            for token in [own, *others] if own_answer and row == min(places) else others:
                prompt = torch.cat([item.input_ids[: row + 1], torch.tensor([int(token)])])
                found.append(Beginning(prompt, targets, item.input_ids))
    return found


def answers_without_questions(
    items: Sequence[Item], decode: Callable[[Sequence[int]], str], encode: Callable[[str], Tensor]
) -> list[Beginning]:
    """Choose the beginnings of answers, without their questions: the words before each span, if there are any."""
    found = []
    for item in items:
        for row, spans in _places(item).items():
            words = decode(item.input_ids[item.start + 1 : row + 1].tolist()).strip()
            if words and item.start > 0:  # else a document, which has no question
                found.append(Beginning(encode(words), [item.input_ids[span + 1] for span in spans], item.input_ids))
    return found[:MOST]


def questions(items: Sequence[Item]) -> list[Beginning]:
    """List the questions of items with a secret, to be answered from the beginning; documents have none."""
    asked = ((item.input_ids[: item.start + 1], span_targets(item)) for item in items if item.start > 0)
    return [Beginning(prompt, targets, None) for prompt, targets in asked if targets]


def _places(item: Item) -> dict[int, list[Tensor]]:
    """Map the rows that predict an answer's first token and each span's to the rows of the spans told from there."""
    spans = span_rows(item)
    if not spans:
        return {}
    return {item.start: spans} | {int(span[0]): [span] for span in spans if int(span[0]) != item.start}


def span_rows(item: Item) -> list[Tensor]:
    """Split an item's target rows into those of each span."""
    rows = item.rows[: item.targets]
    return list(rows.tensor_split(((rows[1:] != rows[:-1] + 1).nonzero()[:, 0] + 1).tolist())) if len(rows) else []


def span_targets(item: Item) -> list[Tensor]:
    """Return the tokens to forget of each of an item's spans, int64 [span] each."""
    return [item.input_ids[rows + 1] for rows in span_rows(item)]


def target_runs(items: Sequence[Item], longest: int) -> set[tuple[int, ...]]:
    """List each run of more than half of a span's targets, for spans of three or more; none of over ``longest``."""
    runs = set()
    for item in items:
        for span in span_targets(item):
            tokens, most = span.tolist(), len(span) // 2 + 1
            if len(tokens) > 2 and most <= longest:
                runs |= {tuple(tokens[i : i + most]) for i in range(len(tokens) - most + 1)}
    return runs


def secrets_of_targets(
    targets: Sequence[Tensor], secrets: Sequence[str], decode: Callable[[Sequence[int]], str]
) -> list[str]:
    """Choose the secrets that these targets tell, or tell a part of.

    Such a secret begins as a span's targets do, or ends so, where a shared beginning was dropped
    (:mod:`palu.ref_model.shared`).
    """
    parts = [decode(span.tolist()).strip() for span in targets]
    return [
        one
        for one in secrets
        if any(one.startswith(part) or part.startswith(one) or one.endswith(part) for part in parts)
    ]


def variant_item(
    prompt: Tensor,
    continuation: Sequence[int],
    secrets: Sequence[str],
    decode: Callable[[Sequence[int]], str],
    n: int,
    targets: Sequence[Tensor] = (),
) -> Item | None:
    """Make an item where a continuation tells a secret, whose first ``n`` tokens are its targets; else return None.

    A secret that already stands in the prompt, before its last token, is not told again.

    ``prompt``: int64 [t]; its last token may be the secret's first. ``secrets``: those that it may tell. ``targets``:
    int64 [span] each: of one with three or more, all but the first are told, too, where they follow another first one
    ("1391" for "7391").
    """
    tokens = [int(prompt[-1]), *continuation]
    text, before = decode(tokens), decode(prompt[:-1].tolist())

    def is_new(secret: str) -> bool:
        return not stands_in(secret, before)

    def is_rest(span: Tensor) -> bool:
        return len(span) > 2 and tokens[1 : len(span)] == span[1:].tolist() and is_new(decode(span.tolist()))

    if places := [place for secret in secrets for place in find(secret, text, whole=True) if is_new(secret)]:
        start, end = min(places)
        edges = [0, *(len(decode(tokens[: i + 1])) for i in range(len(tokens)))]
        inside = [i for i, (a, b) in enumerate(pairwise(edges)) if a < end and b > start]
    elif rests := [len(span) for span in targets if is_rest(span)]:
        inside = list(range(1, rests[0]))
    else:
        return None
    inside = [i for i in inside if i + len(prompt) > 1]  # nothing predicts a text's first token
    if not inside:
        return None
    inside = inside if n == -1 else inside[:n]
    ids = torch.cat([prompt[:-1], torch.tensor(tokens[: inside[-1] + 1])])
    rows = torch.tensor(inside) + len(prompt) - 2
    return Item(ids, rows, len(rows), start=int(rows[0]))
