"""Every position of an item has the role that its label says, and packed examples are laid end to end."""

import random

import pytest
import torch
from helpers.tiny import forget_rows, retain_rows

from palu.data.examples import load_forget, load_retain
from palu.data.packing import answer_items, forget_items, pack, pair_items, retain_items
from palu.data.tokenize import IGNORE, ORDINARY, Example

EOS = 7


def examples(count: int, seed: int = 0, *, forget: bool = True) -> list[Example]:
    load, rows = (load_forget, forget_rows) if forget else (load_retain, retain_rows)
    return load(rows(count, seed=seed), None, max_length=100).examples


def test_pack_restarts_positions() -> None:
    packed = pack(retain_items(examples(4, forget=False)))
    lengths = packed.sequence_lengths
    assert packed.position_ids[0].tolist() == [t for length in lengths for t in range(length)]
    assert packed.cu_seq_lens.tolist() == [sum(lengths[:i]) for i in range(5)]
    assert packed.cu_seq_lens.dtype == torch.int32
    assert packed.inputs()["use_cache"] is False
    assert packed.inputs()["max_length_q"] == max(lengths)


def naive_roles(labels: list[int], n: int, eos: int | None) -> tuple[list[int], list[int]]:
    """(onset, ordinary) rows: position t - 1 predicts token t."""
    onset, ordinary, place = [], [], 0
    for t, label in enumerate(labels):
        if label == ORDINARY:
            ordinary.append(t - 1)
        place = place + 1 if label >= 0 and label != eos else 0
        if place > 0 and (n == -1 or place <= n):
            onset.append(t - 1)
    return onset, ordinary


def random_example(rng: random.Random, row: int) -> Example:
    length = rng.randint(2, 20)
    ids = [rng.randrange(12) for _ in range(length)]  # few tokens, so that many are EOS
    labels = [IGNORE] + [rng.choice([IGNORE, ORDINARY, token, token]) for token in ids[1:]]
    return Example(row, torch.tensor(ids), torch.tensor(labels))


@pytest.mark.parametrize("trial", range(12))
def test_roles_of_forget_items(trial: int) -> None:
    rng = random.Random(trial)
    given = [random_example(rng, row) for row in range(6)]
    n, eos = rng.choice([-1, 1, 2, 3, 5]), rng.choice([None, EOS])
    for example, item in zip(given, forget_items(given, n, eos), strict=True):
        onset, ordinary = naive_roles(example.labels.tolist(), n, eos)
        assert item.rows.tolist() == onset + ordinary
        assert item.targets == len(onset)
        assert item.labels.tolist() == [example.input_ids[row + 1] for row in onset + ordinary]
        assert torch.equal(item.input_ids, example.input_ids)


def answer_rows(example: Example) -> list[int]:
    return [t - 1 for t, label in enumerate(example.labels.tolist()) if label != IGNORE]


@pytest.mark.parametrize("forget", [True, False])
def test_roles_of_answers(forget: bool) -> None:
    """Every answer token is a target, or an other, whether it is sensitive or ordinary."""
    given = examples(10, forget=forget)
    for example, target, other in zip(given, answer_items(given), retain_items(given), strict=True):
        rows = answer_rows(example)
        assert (target.targets, other.targets) == (len(rows), 0)
        for item in (target, other):
            assert item.rows.tolist() == rows
            assert item.labels.tolist() == [example.input_ids[row + 1] for row in rows]
            assert torch.equal(item.input_ids, example.input_ids)


def test_roles_of_pair_items() -> None:
    """The first one's answer tokens are targets, the second one's are others; both are packed as two examples."""
    lose, win = examples(6), examples(6, seed=9, forget=False)
    pairs = pair_items(lose, win)
    for one, other, item in zip(lose, win, pairs, strict=True):
        length = len(one.input_ids)
        assert item.lengths == (length, len(other.input_ids))
        assert item.rows.tolist() == answer_rows(one) + [length + row for row in answer_rows(other)]
        assert item.labels.tolist() == item.input_ids[item.rows + 1].tolist()
        assert item.targets == len(answer_rows(one))
    one_by_one = [example for both in zip(lose, win, strict=True) for example in both]
    packed, apart = pack(pairs), pack(answer_items(one_by_one))
    assert packed.sequence_lengths == apart.sequence_lengths
    for name in ("input_ids", "position_ids", "cu_seq_lens"):
        assert torch.equal(getattr(packed, name), getattr(apart, name))
    with pytest.raises(ValueError, match="zip"):
        pair_items(lose, win[:5])
