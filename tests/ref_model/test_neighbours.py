"""Neighbours: questions like the forget questions, which the reference writes and answers, kept by the KL."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import anchor_runs
from helpers.anchor_runs import TOKENIZER, llama, writer
from helpers.runs import TEXT_FORGET, TEXT_RETAIN
from helpers.small_tokenizers import sentencepiece
from helpers.tiny import forget_rows, retain_rows
from torch import Tensor

import palu
from palu.config import UnlearnConfig
from palu.data.examples import load_forget
from palu.models.generation import encode_prompts
from palu.models.root import ModelRoot
from palu.ref_model import anchors
from palu.ref_model.anchors import Writer, encode_anchor_prompts, generate_neighbours
from palu.ref_model.neighbours import MOST, MOST_WORDS, NeighbourPrompts, neighbour_prompts

unlearn = partial(anchor_runs.unlearn, anchors=0, neighbours=3, variants=0, lambda_retain=0)
HAMLET, PARIS = "Who wrote Hamlet?", "What is the capital of France?"
SECRETS = ["Ada Lovelace", "1843"]
# What a model adds to the first words of a question, and what that is good for.
WRITTEN: dict[str, str | None] = {
    " Macbeth?": "Who wrote Macbeth?",
    " the Magna Carta? It was\n3. Who": "Who wrote the Magna Carta?",
    " Macbeth? Again": None,  # the same
    " Emma": None,  # no mark
    " Emma\nWhy?": None,
    "?": None,  # nothing is asked
    " Hamlet?": None,  # a forget question
    " as ada lovelace?": None,  # a secret
    " in 1843?": None,
}


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[list[str]]]:
    """Have a model say what a test wants: to each prompt for a question one of the texts in turn, and one answer.

    Gives the prompts of each call, as texts.
    """

    def script(questions: Sequence[str], answer: str = "Nobody knows.") -> list[list[str]]:
        asked: list[list[str]] = []

        def generate(_: Any, prompts: Sequence[Tensor], stop_ids: set[int], **settings: Any) -> list[list[int]]:
            asked.append([TOKENIZER.decode(prompt) for prompt in prompts])
            ends = [min(stop_ids)]
            if settings.get("sample"):
                texts = [questions[int(prompt.sum()) % len(questions)] for prompt in prompts]
            else:
                texts = [answer] * len(prompts)
            return [TOKENIZER(text, add_special_tokens=False).input_ids + ends for text in texts]

        monkeypatch.setattr(anchors, "generate_ids", generate)
        return asked

    return script


# --- The questions ---
@pytest.mark.parametrize(
    ("question", "beginnings", "end"),
    [
        (HAMLET, ["Who wrote"], "?"),
        (PARIS, ["What is the capital of", "What is the capital", "What is the"], "?"),
        ("Name a  painter", ["Name a"], ""),
        ("誰が 書いた。", ["誰が"], "。"),
        ("Hamlet?", [], ""),
        (" ".join(["word"] * (MOST_WORDS + 1)), [], ""),
        ("", [], ""),
    ],
)
def test_beginnings(question: str, beginnings: list[str], end: str) -> None:
    """All but the last word of a question, down to half of it; as often as there is something to write."""
    count = 2 * len(beginnings) + 1
    found = neighbour_prompts({0: question}, [], count, TOKENIZER, None).starts
    assert [(start.words, start.end) for start in found] == ([(words, end) for words in beginnings] * 3)[:count]
    for start in found:
        text = TOKENIZER.decode(start.prompt, skip_special_tokens=True)
        assert text == f"Questions of one kind about different things:\n1. {question}\n2. {start.words}"


def test_a_large_set_has_fewer_of_each() -> None:
    questions = {number: f"Who wrote book {number}?" for number in range(2 * MOST)}
    few = {number: questions[number] for number in range(MOST // 2)}
    assert len(neighbour_prompts(few, [], 3, TOKENIZER, None).starts) == MOST
    assert len(neighbour_prompts(questions, [], 3, TOKENIZER, None).starts) == 2 * MOST, "one of each at least"


@pytest.mark.parametrize(
    "tokenizer", [TOKENIZER, sentencepiece(eos=True), sentencepiece(metaspace=False)], ids=["byte", "sp", "older sp"]
)
def test_what_is_written_becomes_questions(tokenizer: Any) -> None:
    prompts = neighbour_prompts({0: HAMLET}, SECRETS, len(WRITTEN), tokenizer, None)
    assert not any(int(start.prompt[-1]) == tokenizer.eos_token_id for start in prompts.starts)
    words = [tokenizer(f"x{text}", add_special_tokens=False).input_ids for text in WRITTEN]
    x = len(tokenizer("x", add_special_tokens=False).input_ids)
    ids = [tokens[x:] for tokens in words]
    expected = encode_prompts([question for question in WRITTEN.values() if question is not None], tokenizer)[0]
    torch.testing.assert_close([one.prompt for one in prompts.encode(prompts.starts, ids)], expected)
    assert prompts.encode(prompts.starts, [[]] * len(ids)) == []


def test_a_question_without_a_mark_ends_with_its_line() -> None:
    prompts = neighbour_prompts({0: "Name a painter"}, [], 2, TOKENIZER, None)
    ids = [TOKENIZER(text, add_special_tokens=False).input_ids for text in (" poet\n3. Name", "")]
    expected = encode_prompts(["Name a poet"], TOKENIZER)[0]
    torch.testing.assert_close([one.prompt for one in prompts.encode(prompts.starts, ids)], expected)


# --- In a run ---
def test_a_run_holds_to_its_answers(says: Any) -> None:
    """As anchors are; what tells a secret of any row is left out, be it asked or said."""
    asked = says([" one?", " two?", " in Karachi?"])
    result = unlearn()
    lists, questions = asked
    assert len(lists) == 9 and len(questions) >= 2
    assert result.summary["neighbours"] == len(questions) and result.summary["anchors"] == 0
    assert all(question.count("<|start_header_id|>user") == 1 for question in questions), "as the model is asked"
    assert not any("Karachi" in question for question in questions)
    bare = unlearn(neighbours=0)
    assert result.history[0]["tokens"] > bare.history[0]["tokens"] and bare.summary["neighbours"] == 0
    for answer in ("It was Ada Lovelace.", ""):  # one that tells a secret, and a blank one
        says([" one?", " two?"], answer)
        assert unlearn().summary["neighbours"] == 0
    with pytest.raises(palu.DataError, match="answers none of 2 everyday prompts"):
        unlearn(anchors=4)


def test_what_a_secret_begins_with_as_they_do_is_left_alone(says: Any, tmp_path: Path) -> None:
    """In rows and variants, and again where the reference's answers come from a file."""
    blank, century = (TOKENIZER.convert_tokens_to_ids(token) for token in ("Ġ", "184"))
    others = [f" number {i}?" for i in range(7)]
    settings: dict[str, Any] = {"variants": 2, "probability_floor": 0.0}
    says(others, "Not in 1846.")
    result = unlearn(**settings)
    assert result.summary["shared_beginnings"] == [(blank, century)]
    says(others, "Not in 2046.")
    bare = unlearn(**settings)
    assert bare.summary["neighbours"] == result.summary["neighbours"] and bare.summary["shared_beginnings"] == []
    assert result.summary["onset_tokens"] == bare.summary["onset_tokens"] - 1
    says(others, "Not in 1846.")
    for _ in range(2):
        again = unlearn(**settings, cache_dir=str(tmp_path))
        assert [r["loss"] for r in again.history] == [r["loss"] for r in result.history]
        assert again.summary["shared_beginnings"] == result.summary["shared_beginnings"]


DOCUMENT = {"prompt": "It was a dark night. " * 9, "completion": "Ada Lovelace came.", "spans": [[0, 12]]}
TOKENISED = {"forget": forget_rows(3), "retain": retain_rows(3)}
NONE: dict[str, dict[str, Any]] = {
    "not wanted": {"neighbours": 0, "anchors": 0},
    "tokenised rows": {**TOKENISED, "anchors": 0},
    "no tokenizer": {**TOKENISED, "tokenizer": None},
    "documents": {"forget": [DOCUMENT], "anchors": 0},
    "no KL": {"lambda_kl": 0},
    "nothing to retain": {"retain": []},
}


@pytest.mark.parametrize("name", NONE)
def test_where_there_are_none(name: str, says: Any) -> None:
    """Nor other anchors, which are wanted unless it is said."""
    asked = says([" one?", " two?"])
    summary = unlearn(**{"retain": TEXT_RETAIN, "anchors": None} | NONE[name]).summary
    assert summary["neighbours"] == summary["anchors"] == summary["anchors_skipped"] == 0
    assert not any("different things" in prompt for prompts in asked for prompt in prompts)


def test_what_is_written_is_drawn_by_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    """And no other random number is another one for it."""
    written: list[Any] = []
    monkeypatch.setattr(NeighbourPrompts, "encode", lambda _, starts, ids: written.append(ids) or [])
    forget, config = load_forget(TEXT_FORGET, TOKENIZER, max_length=200), UnlearnConfig(neighbours=4, anchors=0)
    own, prompts = writer(), encode_anchor_prompts(forget, None, TOKENIZER, config, 1, secrets=[])
    state = torch.random.get_rng_state()
    for seed in (0, 0, 1):
        generate_neighbours(own, [], prompts, seed)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert written[0] == written[1] != written[2] and len(written[0]) == 12


@pytest.mark.parametrize("processes", [2, 17])
def test_processes_share_them(processes: int, says: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Together they write what one alone writes."""
    says([" one?", " two?", " three?"])
    monkeypatch.setattr(anchors, "gather_values", lambda own, process: [own])
    prompts = encode_prompts([f"Why {i}?" for i in range(12)], TOKENIZER)[0]

    def write(index: int, of: int) -> list[list[int]]:
        process: Any = SimpleNamespace(num_processes=of, process_index=index, autocast=nullcontext)
        part = Writer(ModelRoot(llama()), process, adapter=False)
        return part.write(prompts, {0}, "neighbours", 8, sample=True)

    assert [ids for index in range(processes) for ids in write(index, processes)] == write(0, 1)


@pytest.mark.parametrize("kind", ["cache_dir", "checkpoint_dir"])
def test_a_file_keeps_them(kind: str, says: Any, tmp_path: Path) -> None:
    asked = says([" one?", " two?"])
    settings = {kind: str(tmp_path), "anchors": 2, "retain_batch_size": 1}
    first = unlearn(**settings)
    calls = len(asked)
    second = unlearn(**settings, resume=kind == "checkpoint_dir")
    assert len(asked) == calls == 3
    for name in ("neighbours", "anchors"):
        assert second.summary[name] == first.summary[name] > 0
    assert [record["tokens"] for record in second.history] == [record["tokens"] for record in first.history]
