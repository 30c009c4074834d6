"""``kl_prompt="other"``: each answer after the prompt of the row half the set further, tokenised as one text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.small_tokenizers import CHATML, byte_level, sentencepiece
from helpers.tiny import forget_rows

from palu.data.examples import load_forget, load_other_prompts
from palu.data.files import DataError
from palu.data.packing import Items, forget_items, with_other_prompts

# The blank after "Answer:" is a token of its own before a number, and part of the first word elsewhere.
ROWS = [
    {"question": "When was it?", "answer": "1843, in London.", "secret": "1843"},
    {"question": "Who wrote it?", "answer": "The author wrote it.", "secret": "author"},
    {"question": "Where?", "answer": "In the city.", "secret": "city"},
]
TOKENIZERS = {
    "plain": lambda: byte_level(),
    "without BOS": lambda: byte_level(bos=False),
    "sentencepiece": lambda: sentencepiece(),
    "template": lambda: byte_level(CHATML, bos=False),
}


def asked(rows: Any, tokenizer: Any, max_length: int = 99, **settings: Any) -> tuple[Items, Items]:
    """The items of the forget set, and as the reference sees them."""
    loaded = load_forget(rows, tokenizer, max_length=max_length)
    items = forget_items(loaded.examples, -1, None, **settings)
    others = load_other_prompts(loaded.source, tokenizer, loaded.examples, max_length=max_length)
    return items, with_other_prompts(items, loaded.examples, others)


@pytest.mark.parametrize("most_ordinary", [None, 2])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_text_is_tokenised_as_a_whole(name: str, most_ordinary: int | None) -> None:
    """It is the row with the other's question and its own answer; what is looked at is the same."""
    tokenizer = TOKENIZERS[name]()
    own, other = asked(ROWS, tokenizer, most_ordinary=most_ordinary)
    joined = [row | {"question": ROWS[(i + 1) % 3]["question"]} for i, row in enumerate(ROWS)]
    expected = load_forget(joined, tokenizer, max_length=99).examples
    for before, after, whole in zip(own, other, expected, strict=True):
        assert after.input_ids.tolist() == whole.input_ids.tolist() != before.input_ids.tolist()
        assert torch.equal(after.labels, before.labels) and after.targets == before.targets
        assert torch.equal(after.input_ids[after.rows + 1], after.labels)


def test_the_blank_before_an_answer_stays_its_own() -> None:
    """Wherever the rows have it: after the prompt, before the completion, in the form of a question, in a line."""
    tokenizer = byte_level()
    rows = [
        {"prompt": "Who wrote it? ", "completion": "The author.", "secret": "author"},
        {"prompt": "It was in", "completion": " 1843.", "secret": "1843"},
        ROWS[0],
        {"prompt": "Where?\n", "completion": "In the city.", "secret": "city"},
    ]
    _, other = asked(rows, tokenizer)
    assert [tokenizer.decode(item.input_ids, skip_special_tokens=True) for item in other] == [
        "Question: When was it?\nAnswer: The author.",
        "Where? 1843.",
        "Who wrote it? 1843, in London.",
        "It was in\nIn the city.",
    ]


def test_answers_that_keep_their_prompt() -> None:
    """One without a span, one that would not fit behind the other prompt, a document of which a token would change."""
    tokenizer = byte_level()
    long = ROWS[1] | {"question": "Who was it, and the city, the cat, the dog, and the author?"}
    length = len(load_forget([long], tokenizer, max_length=99).examples[0].input_ids)
    kept = [ROWS[0] | {"secret": []}, ROWS[0] | {"answer": "The dog did not; it ran far away.", "secret": "dog"}]
    kept.append({"prompt": "", "completion": "The cat sat on the mat.", "secret": "cat"})
    for row in kept:
        own, other = asked([row, long], tokenizer, max_length=length)
        assert other[0].input_ids.tolist() == own[0].input_ids.tolist()
        assert other[1].input_ids.tolist() != own[1].input_ids.tolist()
    document = kept.pop() | {"completion": "The cat sat."}
    own, other = asked([document, ROWS[0]], byte_level(bos=False))
    assert all(bool((item.rows >= 0).all()) for item in other)
    assert other[0].input_ids.tolist() == own[0].input_ids.tolist()


def test_rows_that_were_cut_off_are_left_out() -> None:
    tokenizer = byte_level()
    cut = ROWS[0] | {"question": "Where? " * 99}
    loaded = load_forget([cut, *ROWS], tokenizer, max_length=60, allow_cut_spans=True)
    others = load_other_prompts(loaded.source, tokenizer, loaded.examples, max_length=60)
    expected = load_other_prompts(ROWS, tokenizer, load_forget(ROWS, tokenizer, max_length=60).examples, max_length=60)
    assert [one.row for one in others] == [1, 2, 3]
    assert [one.input_ids.tolist() for one in others] == [one.input_ids.tolist() for one in expected]


def test_rows_that_come_once() -> None:
    """They are kept, to be read again."""
    for once, again in zip(asked(iter(ROWS), byte_level()), asked(ROWS, byte_level()), strict=True):
        assert [item.input_ids.tolist() for item in once] == [item.input_ids.tolist() for item in again]


def test_refused() -> None:
    tokenizer = byte_level()
    rows = [ROWS[0], *forget_rows(1)]
    with pytest.raises(DataError, match=r"^forget row 1: "):
        asked(rows, tokenizer)
    same = ROWS[0] | {"answer": "It was in 1843."}
    for given in ([ROWS[0]], [ROWS[0], same]):  # there is no other prompt
        with pytest.raises(DataError, match=r"^kl_prompt = 'other': "):
            asked(given, tokenizer)
