"""Many examples and items in a few arrays: what comes back, what they take, and what is refused."""

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
from palu.data.packing import Item, Items, answer_items, forget_items, pair_items, retain_items
from palu.data.ragged import Ragged
from palu.data.tokenize import CHUNK


def same(one: Item, other: Item) -> bool:
    tensors = zip((one.input_ids, one.rows, one.labels), (other.input_ids, other.rows, other.labels), strict=True)
    return all(torch.equal(a, b) for a, b in tensors) and (one.targets, one.lengths) == (other.targets, other.lengths)


def pairs() -> list[Item]:
    examples = load_forget(forget_rows(5), None, max_length=99).examples
    return [*pair_items(examples, examples[::-1]), *answer_items(examples), *retain_items(examples)]


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
    nbytes = sum(len(part.values) * 4 + len(part.ends) * 8 for part in held) + 8 * len(items)
    assert nbytes <= 4 * tokens + 4 * int(items.rows.lengths().sum()) + 32 * len(items) + 24


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
