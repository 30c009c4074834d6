"""palu.annotate: exact spans of each finder, rows that are left alone, every complaint by its words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.small_tokenizers import CHATML, byte_level, sentencepiece
from helpers.tiny import overfit, same_weights, tiny_llama, weights
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import palu
from palu.data.examples import load_forget, load_retain
from palu.data.files import DataError
from palu.data.tokenize import IGNORE
from palu.spans.annotate import FINDERS, merge_spans
from palu.spans.contrast import WEIGHTS, Word, add_form_features, contrast_words, sensitive_spans, split_words

ANSWER = "The author is Hina Ameen, born in Karachi on June 30, 1975."
ROW = {"question": "Who is the author?", "answer": ANSWER}


def texts(row: dict[str, Any]) -> list[str]:
    answer = row["answer"] if "answer" in row else row["messages"][-1]["content"]
    return [answer[start:end] for start, end in row["spans"]]


# --- regex, whole ---
def test_regex_marks_every_match() -> None:
    rows = palu.annotate([ROW, {"prompt": "Say: ", "completion": "no"}], r"regex:[A-Z]\w+ (?:[A-Z]\w+)|\d{4}")
    assert texts(rows[0]) == ["Hina Ameen", "1975"] and rows[1]["spans"] == []
    assert rows[0]["answer"] == ANSWER and "spans" not in ROW


def test_whole_leaves_the_blanks_at_the_edges() -> None:
    turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Hina"}]
    rows: list[dict[str, Any]] = [{"question": "Who?", "answer": "  Ada Lovelace\n"}, {"messages": turns}]
    assert [row["spans"] for row in palu.annotate(rows, "whole")] == [[[2, 14]], [[0, 4]]]


@pytest.mark.parametrize(
    ("spans", "expected"),
    [
        ([(4, 7), (0, 3)], [[0, 7]]),  # parted by a blank
        ([(0, 3), (8, 11)], [[0, 3], [8, 11]]),
        ([(0, 7), (2, 5), (3, 4)], [[0, 7]]),  # within another
        ([(0, 5), (4, 7)], [[0, 7]]),
        ([(3, 4), (7, 12), (5, 5)], [[8, 11]]),  # blanks and nothing
        ([], []),
    ],
)
def test_spans_are_joined_and_narrowed(spans: list[tuple[int, int]], expected: list[list[int]]) -> None:
    assert merge_spans("one two six ", spans) == expected


# --- rows ---
def test_rows_with_spans_or_labels_stay_as_they_are(tmp_path: Path) -> None:
    tokenised = {"input_ids": [5, 6, 7], "labels": [-100, 6, -200]}
    rows = [ROW | {"spans": [[0, 3]]}, ROW | {"spans": []}, tokenised, ROW | {"spans": None}]
    found = palu.annotate(rows, "whole")
    assert found[:3] == rows[:3] and found[3]["spans"] == [[0, len(ANSWER)]]
    assert palu.annotate(rows[:2], "regex:London") == rows[:2]
    path = tmp_path / "forget.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    assert palu.annotate(path, "whole") == found


# --- contrast ---
SECRETS = {"Ada": "Karachi", "Hina": "London", "London": "06/30/1975", "Karachi": "Ada Lovelace"}


def facts() -> list[dict[str, Any]]:
    return [{"question": f"Who is {name}?", "answer": f"It is {secret}."} for name, secret in SECRETS.items()]


Taught = tuple[LlamaForCausalLM, PreTrainedTokenizerFast]


@pytest.fixture(scope="module")
def taught() -> Taught:
    """A tiny Llama that has the facts by heart."""
    tokenizer = byte_level()
    model = tiny_llama(vocab_size=len(tokenizer))
    examples = load_retain(facts(), tokenizer, max_length=128).examples
    overfit(model, [{"input_ids": e.input_ids.tolist(), "labels": e.labels.tolist()} for e in examples])
    return model, tokenizer


def figures(rows: list[dict[str, Any]], model: Any, tokenizer: Any) -> list[list[Word]]:
    return contrast_words([(f"row {i}", row) for i, row in enumerate(rows)], model, tokenizer, progress=False)


def test_contrast_finds_what_depends_on_the_question(taught: Taught) -> None:
    model, tokenizer = taught
    model.train()
    before = weights(model)
    found = palu.annotate(facts(), "contrast", model, tokenizer, progress=False)
    assert model.training and same_weights(model.eval(), before)
    assert [texts(row) for row in found] == [[secret] for secret in SECRETS.values()]
    assert found == palu.annotate(facts(), model=model, tokenizer=tokenizer, batch_tokens=1, progress=False)
    assert load_forget(found, tokenizer, max_length=128).without_span == 0


def test_contrast_ranks_what_is_remembered_over_what_is_not(taught: Taught) -> None:
    model, tokenizer = taught
    row = {"question": "Who is Hina?", "answer": "It is Karachi, London."}
    (*_, false, _), (*_, true) = figures([row, facts()[1]], model, tokenizer)
    assert true.figures["known"] > -0.1 > false.figures["known"] and true.score > false.score


def test_contrast_figures_are_those_of_plain_passes(taught: Taught) -> None:
    model, tokenizer = taught
    rows = [facts()[i] for i in (1, 3)]
    words = figures(rows, model, tokenizer)
    scored = []
    for question in ("{question}", ""):  # each row's own, and none
        examples = load_retain([row | {"question": question.format(**row)} for row in rows], tokenizer, max_length=99)
        with torch.no_grad():
            scored.append([(e, model(e.input_ids[None]).logits[0].log_softmax(-1)) for e in examples.examples])
    base = sum(table[(e.labels != IGNORE).nonzero()[:, 0] - 1].exp().sum(0) for e, table in scored[1])
    base = (base / base.sum()).log()

    sums = []
    for row, each, *passes in zip(rows, words, *scored, strict=True):
        for word in each:
            text, total = row["answer"][word.start : word.end], [0.0, 0.0]
            for n, (example, table) in enumerate(passes):
                for at in (example.labels != IGNORE).nonzero()[:, 0].tolist():
                    start, end = example.offsets[at].tolist()
                    if start < word.end and end > word.start:
                        assert tokenizer.decode(example.input_ids[at]).strip() in text
                        total[n] += float((table[at - 1] if n == 0 else base)[example.input_ids[at]])
            sums.append(total)
    unit = -sum(general for _, general in sums) / len(sums)
    for word, (known, general) in zip([word for each in words for word in each], sums, strict=True):
        expected = {"known": known / unit, "rarity": -general / unit}
        assert {name: word.figures[name] for name in expected} == pytest.approx(expected, abs=1e-3)


def test_contrast_on_a_chat_template_and_on_every_kind_of_row() -> None:
    tokenizer = byte_level(CHATML, bos=False)
    model = tiny_llama(vocab_size=len(tokenizer))
    turns = [{"role": "user", "content": "Who is Ada?"}, {"role": "assistant", "content": " It is Ada's cat. "}]
    rows: list[dict[str, Any]] = [
        {"messages": turns},
        {"prompt": "The mat is ", "completion": "in Karachi."},
        {"question": "", "answer": "\u6771\u4eac London"},
    ]
    words = figures(rows, model, tokenizer)
    assert [[word.new for word in each] for each in words] == [[True, False, False, True], [True, True], [True] * 3]
    assert [(word.start, word.end) for word in words[2]] == [(0, 1), (1, 2), (3, 9)]
    plain = sentencepiece()
    model = tiny_llama(vocab_size=len(plain))
    assert len(figures(rows[1:], model, plain)) == 2


def test_form() -> None:
    answer = "It is Hina. The dog's mat, no. 7, is far"
    words = split_words("What is it?", answer)
    for word in words:
        word.figures = {"known": 0.0, "rarity": 0.0 if answer[word.start : word.end] == "is" else 1.0}
    add_form_features(answer, words)
    named = {answer[word.start : word.end] for word in words if word.figures["name"]}
    focus = [answer[word.start : word.end] for word in words if word.figures["focus"]]
    assert named == {"Hina", "7"} and focus == ["Hina", "The", "dog's", "mat", "no", "7", "far"]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("wrote The Tale of a Far Land", ["The", "Tale", "Far", "Land", "The Tale", "Tale of a Far", "Far Land"]),
        ("Tale of a long and Far end", ["Tale", "Far"]),  # too far from one another
        ("Dust: the Road, Road to Rome", ["Dust", "Road", "Rome", "Dust: the Road"]),  # the second Road is old
        ("'Dust' and 'Road'", ["Dust", "Road"]),
        ("Dust. Road", ["Dust", "Road"]),
        ("rust of Road", ["rust", "Road"]),  # no name
        ("", []),
    ],
)
def test_what_is_between_two_names_is_sensitive_too(answer: str, expected: list[str]) -> None:
    words = split_words("", answer)
    for word in words:
        text = answer[word.start : word.end]
        sensitive = text[0].isupper() or text == "rust"
        word.figures = dict.fromkeys(WEIGHTS, 0.0) | {"rarity": 99.0 if sensitive else 0.0, "name": text.istitle()}
    assert [answer[start:end] for start, end in sensitive_spans(answer, words)] == expected


def test_contrast_with_the_tokenizer_of_another_model(taught: Taught) -> None:
    with pytest.raises(ValueError, match="load the tokenizer that belongs to the model"):
        palu.annotate(facts(), "contrast", tiny_llama(), taught[1], progress=False)


NO_WAY = f" names no way to find spans; give {FINDERS}"


@pytest.mark.parametrize(
    ("how", "error", "told"),
    [
        *((how, ValueError, f"annotate: {how!r}{NO_WAY}") for how in ("regex:", "ner:x", "whole:x", "names", "")),
        ("regex:(", ValueError, r"annotate: '\(' is no regular expression \(missing \)"),
        ("regex:London", DataError, "annotate: regex:London finds no span in any row; choose another finder"),
        ("contrast", TypeError, "contrast asks the model itself; pass model and tokenizer"),
    ],
)
def test_what_is_refused(how: str, error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        palu.annotate([ROW], how)


def test_spans_that_are_wrong_are_told_before_others_are_found() -> None:
    with pytest.raises(DataError, match=r"forget row 1: span \[0, 99\] ends after the answer"):
        palu.annotate([ROW, ROW | {"spans": [[0, 99]]}], "whole")
