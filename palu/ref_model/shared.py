"""Shared beginnings: tokens with which a secret begins, and answers to other questions of its kind do as well.

Nearly all years begin with "1". A model that may not say "1" where it said "1815" says another digit where it said
"1789", too, and the rest of that year goes with it. So the reference's answers to neighbours
(:mod:`palu.ref_model.neighbours`) are counted: where enough of them go on from the token before a secret as the secret
does, its first token is left alone, and so are those after it for which that holds; never the last of its targets.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from itertools import takewhile
from typing import TypeAlias

import torch

from palu.data.packing import Item, Items
from palu.ref_model.variants import span_rows

LEAST = 3  # answers that go on so
SHARE = 1 / 3  # of the answers that have the token before

TokenPair: TypeAlias = tuple[int, int]  # a token, and the one after it


def shared_pairs(neighbours: Sequence[Item]) -> frozenset[TokenPair]:
    """Find the pairs of tokens that enough answers share; however often one has it, it counts once."""
    before: Counter[int] = Counter()
    pairs: Counter[TokenPair] = Counter()
    for item in neighbours:
        of_item = _pairs(item, item.rows.tolist())
        before.update({first for first, _ in of_item})
        pairs.update(set(of_item))
    return frozenset(pair for pair, count in pairs.items() if count >= max(LEAST, SHARE * before[pair[0]]))


def drop_shared_targets(items: Sequence[Item], shared: AbstractSet[TokenPair]) -> Sequence[Item]:
    """Drop the shared beginnings of secrets from the targets of items."""
    return Items(_reduced(item, shared_rows(item, shared)) for item in items) if shared else items


def dropped_pairs(items: Sequence[Item], shared: AbstractSet[TokenPair]) -> list[TokenPair]:
    """List the pairs of tokens for which :func:`drop_shared_targets` drops targets."""
    return sorted({pair for item in items for pair in _pairs(item, shared_rows(item, shared))})


def shared_rows(item: Item, shared: AbstractSet[TokenPair]) -> list[int]:
    """List the rows that predict the tokens of shared beginnings."""
    found = []
    for span in span_rows(item):
        rows = span[:-1].tolist()
        pairs = _pairs(item, rows)
        found += [row for row, _ in takewhile(lambda one: one[1] in shared, zip(rows, pairs, strict=True))]
    return found


def _pairs(item: Item, rows: Sequence[int]) -> list[TokenPair]:
    return [(int(item.input_ids[row]), int(item.input_ids[row + 1])) for row in rows]


def _reduced(item: Item, rows: Sequence[int]) -> Item:
    if not rows:
        return item
    keep = ~torch.isin(item.rows, torch.tensor(rows))
    return replace(item, rows=item.rows[keep], targets=item.targets - len(rows))
