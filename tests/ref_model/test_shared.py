"""Shared beginnings: what a secret begins with and the answers to other questions do as well is left alone."""

from __future__ import annotations

import torch

from palu.data.packing import Item, Items, anchor_item
from palu.ref_model.shared import drop_shared_targets, dropped_pairs, shared_pairs, shared_rows

BLANK, ONE, NINE, EIGHT, TWO, IN = 1, 2, 3, 4, 5, 6


def answer(*tokens: int) -> Item:
    """An anchor whose answer these are, after a prompt that ends with IN."""
    return anchor_item(torch.tensor([BLANK, ONE, IN, *tokens]), 3)


def test_pairs_that_a_third_of_three_answers_share() -> None:
    years = [answer(BLANK, ONE, NINE), answer(BLANK, ONE, EIGHT), answer(BLANK, ONE, EIGHT)]
    assert shared_pairs(years) == {(BLANK, ONE), (IN, BLANK)}, "the prompt's own tokens are nobody's answer"
    assert shared_pairs(years[:2]) == shared_pairs([]) == frozenset()
    # One that says it again and again is one answer still; so is one that goes on in two ways.
    assert (BLANK, ONE) not in shared_pairs([answer(*[BLANK, ONE] * 5), *years[:1]])
    others = [answer(BLANK, TWO)] * 6
    assert (BLANK, ONE) in shared_pairs([*years, *others]), "three of nine"
    assert (BLANK, ONE) not in shared_pairs([*years, *others, answer(BLANK, TWO)]), "three of ten"


def item(*spans: tuple[int, ...]) -> Item:
    """An item of these spans, with a blank before each and an ordinary token after it."""
    ids, targets, others = [IN], [], []
    for span in spans:
        ids.append(BLANK)
        targets += range(len(ids) - 1, len(ids) - 1 + len(span))
        ids += [*span, 9]
        others.append(len(ids) - 2)
    return Item(torch.tensor(ids), torch.tensor([*targets, *others]), len(targets))


def forgotten(item: Item) -> list[int]:
    return item.labels[: item.targets].tolist()


def test_the_beginning_is_left_alone() -> None:
    shared = frozenset({(BLANK, ONE), (ONE, NINE), (EIGHT, ONE)})
    cases = {
        (ONE, EIGHT, ONE, 7): [EIGHT, ONE, 7],  # what comes after another token is no beginning
        (ONE, NINE, 7): [7],
        (ONE, NINE): [NINE],  # never all of it
        (ONE,): [ONE],
        (TWO, EIGHT): [TWO, EIGHT],
    }
    for span, left in cases.items():
        (found,) = drop_shared_targets([item(span)], shared)
        assert forgotten(found) == left
        assert found.labels[found.targets :].tolist() == [9], "ordinary tokens stay"
        assert len(shared_rows(item(span), shared)) == len(span) - len(left)
        (again,) = drop_shared_targets([found], shared)
        assert forgotten(again) == left, "of the rest nothing more"
    both = item((ONE, EIGHT), (ONE, TWO))
    (found,) = drop_shared_targets([both], shared)
    assert forgotten(found) == [EIGHT, TWO]
    assert dropped_pairs([both, item((TWO,))], shared) == [(BLANK, ONE)]
    assert dropped_pairs([both], frozenset()) == [] and forgotten(
        drop_shared_targets([both], frozenset())[0]
    ) == forgotten(both)


def test_items_without_targets_are_as_they_were() -> None:
    kept = answer(BLANK, ONE, NINE)
    (found,) = drop_shared_targets(Items([kept]), frozenset({(BLANK, ONE)}))
    assert torch.equal(found.rows, kept.rows) and found.targets == 0
