"""Items: the role of each position, packed end to end, and many of them in a few arrays."""

from __future__ import annotations

import random

import pytest
import torch
from helpers.runs import TEXT_FORGET
from helpers.small_tokenizers import byte_level
from helpers.tiny import forget_rows, retain_rows

import palu
from palu.data import packing
from palu.data.examples import load_alternates, load_forget, load_retain
from palu.data.packing import Item, Items, answer_items, forget_items, pack, pair_items, retain_items
from palu.data.ragged import Ragged
from palu.data.tokenize import CHUNK, IGNORE, ORDINARY, Example

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


def test_what_examples_begin_with_comes_once() -> None:
    """The leader is the one with which the others have most in common; each keeps a token of its own."""
    system, other = list(range(100, 112)), list(range(200, 230))
    ids = [[*other, 1], [*system, 1, 2, 3], [*system, 1, 2, 4, 5], system, [*system[:7], 9, 9], [*other[:9], 7]]
    items = [Item(torch.tensor(i), torch.arange(len(i) - 1, -1, -1)) for i in ids]
    packed = pack(items, share_prefix=True)
    assert packed.leader == 1
    assert packed.shared_lengths == (0, 0, 14, 11, 0, 0)  # seven are too few
    assert packed.sequence_lengths == tuple(len(i) - n for i, n in zip(ids, packed.shared_lengths, strict=True))
    assert packed.cu_seq_lens.diff().tolist() == list(packed.sequence_lengths)
    for item, rows in zip(items, packed.rows(items), strict=True):
        assert torch.equal(packed.input_ids[0, rows], item.input_ids[item.rows])
        assert torch.equal(packed.position_ids[0, rows], item.rows)
    for few in (items[:1], items[:2], [Item(items[0].input_ids[:1], items[0].rows[:0]), items[1]]):
        assert not any(pack(few, share_prefix=True).shared_lengths)


@pytest.mark.parametrize("share", [False, True])
def test_rows_of_packed_pairs(share: bool) -> None:
    """Of both answers of a pair, which have their question in common."""
    question = torch.arange(20)
    answers = [torch.arange(50, 57), torch.arange(70, 73), torch.arange(90, 99)]
    texts = [torch.cat([question, answer]) for answer in answers]
    pair = Item(torch.cat(texts[:2]), torch.tensor([22, 3, 27, 48]), 2, (27, 23))
    items = [Item(texts[2], torch.tensor([1, 25])), pair]
    packed = pack(items, share_prefix=share)
    assert packed.shared_lengths == ((0, 20, 20) if share else (0, 0, 0))
    for item, rows in zip(items, packed.rows(items), strict=True):
        assert torch.equal(packed.input_ids[0, rows], item.input_ids[item.rows])
    assert packed.position_ids[0, packed.rows(items)[1]].tolist() == [22, 3, 0, 21]


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
    labels = [IGNORE, *(rng.choice([IGNORE, ORDINARY, token, token]) for token in ids[1:-1])]
    labels.append(rng.choice([ORDINARY, ids[-1]]))
    return Example(row, torch.tensor(ids), torch.tensor(labels))


@pytest.mark.parametrize("trial", range(12))
def test_roles_of_forget_items(trial: int) -> None:
    rng = random.Random(trial)
    given = [random_example(rng, row) for row in range(6)]
    n, eos = rng.choice([-1, 1, 2, 3, 5]), rng.choice([None, EOS])
    for example, item in zip(given, forget_items(given, n, eos), strict=True):
        onset, ordinary = naive_roles(example.labels.tolist(), n, eos)
        assert item.rows.tolist() == onset + ordinary
        assert item.targets == len(onset) and item.start == answer_rows(example)[0]
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


# --- Many of them ---
def same(one: Item, other: Item) -> bool:
    tensors = zip((one.input_ids, one.rows, one.labels), (other.input_ids, other.rows, other.labels), strict=True)
    numbers = ((item.targets, item.lengths, item.start) for item in (one, other))
    return all(torch.equal(a, b) for a, b in tensors) and next(numbers) == next(numbers)


def pairs() -> list[Item]:
    examples = load_forget(forget_rows(5), None, max_length=99).examples
    forget = forget_items(examples, 2, None)
    return [*pair_items(examples, examples[::-1]), *answer_items(examples), *retain_items(examples), *forget]


def test_items_come_back_as_they_were() -> None:
    items = [*pairs(), Item(torch.tensor([3]), torch.empty(0, dtype=torch.int64))]
    kept = Items(items)
    assert len(kept) == len(items)
    assert all(map(same, kept, items))
    assert same(kept[-1], items[-1])
    assert all(map(same, kept[1:7:2], items[1:7:2]))
    with pytest.raises(IndexError):
        kept[len(items)]
    assert kept[0].input_ids.dtype == kept[0].rows.dtype == torch.int64
    assert Items.of(kept) is kept
    assert kept.tokens.tolist() == [len(item.input_ids) for item in items]
    assert kept.targets.tolist() == [item.targets for item in items]
    assert kept.others.tolist() == [len(item.rows) - item.targets for item in items]
    assert kept.longest() == max(length for item in items for length in item.lengths or (len(item.input_ids),))
    assert Items().longest() == len(Items().tokens) == 0


def test_ids_that_do_not_fit_are_refused() -> None:
    with pytest.raises(OverflowError, match="int32"):
        Ragged().append(torch.tensor([2**31]))
    rows = [{"input_ids": [1, 2**31], "labels": [-100, 2**31]}]
    with pytest.raises(palu.DataError, match=r"^forget row 0: label 2147483648 at token 1 is outside the vocabulary"):
        load_forget(rows, None, max_length=9)


def test_the_longest_row_costs_no_other_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither memory nor work grows by (rows) x (tokens of the longest)."""
    long = {"input_ids": [5] * 4000, "labels": [-100] + [-200, 5] * 1999 + [5]}
    seen: list[int] = []
    original = packing.prefix_mask

    def counting(labels: torch.Tensor, *args: object) -> torch.Tensor:
        seen.append(labels.numel())
        return original(labels, *args)

    monkeypatch.setattr(packing, "prefix_mask", counting)
    loaded = load_forget([*forget_rows(200), long], None, max_length=4000)
    items = forget_items(loaded.examples, 3, None)
    tokens = sum(len(example.input_ids) for example in loaded.examples)
    assert sum(seen) == tokens
    held = [items.input_ids, items.rows, items.example_lengths]
    nbytes = sum(len(part.values) * 4 + len(part.ends) * 8 for part in held) + 16 * len(items)
    assert nbytes <= 4 * tokens + 4 * int(items.rows.lengths().sum()) + 40 * len(items) + 24


def test_rows_are_read_as_they_are_needed() -> None:
    """A row that cannot be used is told before the rows after it are read."""
    read = 0

    def rows() -> object:
        nonlocal read
        for number in range(3 * CHUNK):
            read += 1
            yield {"input_ids": [1, 2], "labels": [-100, -200 if number == 3 else 2] if number != 5 else [-100]}

    with pytest.raises(palu.DataError, match="forget row 5: labels have 1 tokens"):
        load_forget(rows(), None, max_length=9)
    assert read == 6


def test_more_rows_than_a_chunk() -> None:
    rng, tokenizer = random.Random(0), byte_level()
    rows = [rng.choice(TEXT_FORGET[:2]) | {"alternate": f"No {number}."} for number in range(CHUNK + 5)]
    loaded = load_forget(rows, tokenizer, max_length=99).examples
    assert [example.row for example in loaded] == list(range(len(rows)))
    for number in (0, CHUNK - 1, CHUNK, CHUNK + 4):
        (alone,) = load_forget([rows[number]], tokenizer, max_length=99).examples
        assert torch.equal(loaded[number].labels, alone.labels)
        assert torch.equal(loaded[number].offsets, alone.offsets)
    alternates = load_alternates(rows, tokenizer, loaded, max_length=99)
    assert len(alternates) == len(rows)
    (alone,) = load_alternates([rows[-1]], tokenizer, loaded[:1], max_length=99)
    assert torch.equal(alternates[-1].input_ids, alone.input_ids)


def test_a_loaded_set_is_not_loaded_again() -> None:
    tokenizer = byte_level()
    loaded = load_forget(TEXT_FORGET, tokenizer, max_length=99)
    assert load_forget(loaded, tokenizer, max_length=99) is loaded
    with pytest.raises(ValueError, match=r"^forget set was loaded with max_length = 99, not 50; load it again$"):
        load_forget(loaded, tokenizer, max_length=50)
    needed = max(int((example.labels >= 0).nonzero().max()) + 1 for example in loaded.examples[:2])
    # What may be allowed or not is asked each time.
    cut = load_forget(TEXT_FORGET, tokenizer, max_length=needed - 1, allow_cut_spans=True)
    with pytest.raises(palu.DataError, match=f"max_length = {needed - 1} cuts off spans of 1 row"):
        load_forget(cut, tokenizer, max_length=needed - 1)
    kept = load_retain(retain_rows(), None, max_length=99)
    assert load_retain(kept, None, max_length=99) is kept
    with pytest.raises(ValueError, match=r"^forget set was loaded with set = 'retain', not 'forget'; load it again$"):
        load_forget(kept, None, max_length=99)


def test_most_ordinary_rows() -> None:
    examples = load_forget(forget_rows(30), None, max_length=99).examples
    every = forget_items(examples, 2, None)
    drawn, again, other = (forget_items(examples, 2, None, most_ordinary=2, seed=seed) for seed in (0, 0, 1))
    assert drawn.others.tolist() == every.others.clamp(max=2).tolist()
    assert drawn.targets.tolist() == every.targets.tolist()
    for one, whole in zip(drawn, every, strict=True):
        assert torch.equal(one.rows[: one.targets], whole.rows[: one.targets])
        chosen = one.rows[one.targets :].tolist()
        assert chosen == sorted(set(chosen) & set(whole.rows[one.targets :].tolist()))
    assert all(map(same, drawn, again))
    assert not all(map(same, drawn, other))
    none = forget_items(examples, 2, None, onset=False, most_ordinary=0)
    assert int(none.targets.sum()) == int(none.others.sum()) == 0
