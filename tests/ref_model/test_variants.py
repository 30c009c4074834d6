"""Variants: other ways in which the reference tells a secret, which are forgotten, too."""

from __future__ import annotations

from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import anchor_runs
from helpers.anchor_runs import TOKENIZER, llama, writer
from helpers.runs import TEXT_FORGET, TEXT_RETAIN
from helpers.small_tokenizers import sentencepiece
from helpers.tiny import forget_rows, retain_rows

import palu
from palu.config import UnlearnConfig
from palu.data.examples import load_forget
from palu.data.packing import forget_items
from palu.methods.base import ForgetSet
from palu.ref_model import anchors, variants
from palu.ref_model.anchors import encode_anchor_prompts, generate_variants
from palu.ref_model.variants import (
    CONTINUATION,
    PER_PLACE,
    answers_without_questions,
    other_candidates,
    questions,
    secrets_of_targets,
    variant_item,
)

unlearn = partial(anchor_runs.unlearn, retain=TEXT_RETAIN, anchors=0, neighbours=0, variants=4, probability_floor=0.0)
FORGET = load_forget(TEXT_FORGET, TOKENIZER, max_length=200)
ITEMS = forget_items(FORGET.examples, -1, None)
SPANS = 3  # two in the first row, the first of them at the answer's beginning; one in the second
PLACES = 4  # where these begin, and the second row's answer
ROWS = 2  # with spans: from the first token of each one's answer the model also goes on
STEMS = 2  # spans with words of the answer before them
FIRST = PER_PLACE * PLACES + STEMS + 4 * ROWS  # variants where the model tells all: 4 paraphrases a question differ
TOLD = 2 * FIRST  # from the likeliest other candidate for the secret's first token in each it goes on again


def encode(text: str) -> torch.Tensor:
    return torch.tensor(TOKENIZER(text, add_special_tokens=False).input_ids)


def decode(ids: Any) -> str:
    return str(TOKENIZER.decode(ids))


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Whatever it is asked, the model tells all secrets. Grows by how many texts it is to go on with."""
    asked: list[int] = []

    def generate(_: Any, prompts: Any, *__: Any, **settings: Any) -> list[list[int]]:
        asked.append(len(prompts))
        if settings.get("sample"):  # a paraphrase; whether one tells a secret is another test
            return [TOKENIZER(f" In other words {i}?").input_ids for i in range(len(prompts))]
        return [TOKENIZER(" it was Ada Lovelace, 1843, Karachi", add_special_tokens=False).input_ids] * len(prompts)

    monkeypatch.setattr(anchors, "generate_ids", generate)
    return asked


@torch.no_grad()
@pytest.mark.parametrize("most", [1000, 2 * PLACES, 1])
def test_other_candidates(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The likeliest at the beginning of each answer with a span, and of each span, but for the token that is there."""
    monkeypatch.setattr(variants, "MOST", most)
    count, model, expected = min(4, max(most // PLACES, 1)), llama(), []
    for example in FORGET.examples:
        logits = model(input_ids=example.input_ids[None]).logits[0]
        labels, ids = example.labels.tolist(), example.input_ids.tolist()
        begins = [t for t in range(1, len(labels)) if labels[t] >= 0 > labels[t - 1]]
        spans = {t: list(takewhile(lambda label: label >= 0, labels[t:])) for t in begins}
        for t in sorted({example.answer_start, *begins}) if begins else ():
            order = [i for i in logits[t - 1].argsort(descending=True).tolist() if i != ids[t]]
            first = t == example.answer_start
            told = list(spans.values()) if first else [spans[t]]
            expected += [([*ids[:t], token], told, ids) for token in [ids[t]] * first + order[:count]]
    found = other_candidates(model, ITEMS, 4, own_answer=True)
    assert [(prompt.tolist(), [s.tolist() for s in told], row.tolist()) for prompt, told, row in found] == expected
    assert len(expected) == count * PLACES + ROWS


def test_answers_without_their_questions() -> None:
    found = answers_without_questions(ITEMS, decode, encode)
    expected = []
    for row, example in zip(TEXT_FORGET, ITEMS, strict=True):
        for start, end in row.get("spans", []):
            if start > 0:
                answer = row["answer"]
                expected.append((answer[:start].strip(), answer[start:end].strip(), example.input_ids.tolist()))
    said = [(decode(prompt), [decode(span).strip() for span in spans], row.tolist()) for prompt, spans, row in found]
    assert said == [(words, [secret], row) for words, secret, row in expected] and len(said) == STEMS
    row = {"prompt": "", "completion": "Ada was born in 1815.", "secret": "1815"}
    document = load_forget([row], sentencepiece(), max_length=99)
    assert answers_without_questions(forget_items(document.examples, -1, None), decode, encode) == []


def test_a_secret_is_looked_for_where_its_span_is() -> None:
    spans = [encode(" Ada"), encode(" 1843")]
    secrets = ["Ada Lovelace", "1843", "Karachi"]
    assert secrets_of_targets(spans, secrets, decode) == secrets[:2]
    assert (
        secrets_of_targets(spans[1:], secrets, decode)
        == secrets_of_targets([encode("843")], secrets, decode)
        == ["1843"]
    )


@pytest.mark.parametrize("tokenizer", [TOKENIZER, sentencepiece()], ids=["byte", "sp"])
@pytest.mark.parametrize("n", [-1, 1])
@pytest.mark.parametrize(
    ("text", "told"),
    [
        (" the ada lovelace, in 1843", "ada lovelace"),  # what comes after it is left out
        (" Ada Lovelace did", "ada lovelace"),
        (" 1843: Ada Lovelace did", "ada lovelace"),
        (" nobody in 1844", None),
    ],
)
def test_the_secrets_tokens_are_the_targets(tokenizer: Any, n: int, text: str, told: str | None) -> None:
    decode = partial(tokenizer.decode, skip_special_tokens=True)
    before = tokenizer("Who? It was", return_tensors="pt").input_ids[0]
    x, both = (tokenizer(t, add_special_tokens=False).input_ids for t in ("x", f"x{text}"))
    ids = torch.tensor(both[len(x) :])  # the text's tokens within another
    item = variant_item(torch.cat([before, ids[:1]]), ids[1:].tolist(), ["Ada Lovelace"], decode, n)
    assert (item is None) == (told is None)
    if item is not None and told is not None:
        assert item.input_ids.tolist() == torch.cat([before, ids])[: len(item.input_ids)].tolist()
        assert item.targets == len(item.rows) and torch.equal(item.labels, item.input_ids[item.rows + 1])
        assert int(item.rows[-1]) == len(item.input_ids) - 2
        said = decode(item.labels).strip().casefold()
        assert said == told if n == -1 else told.startswith(said) and item.targets == 1


@pytest.mark.parametrize("n", [-1, 1])
def test_the_rest_of_a_secret_after_another_beginning(n: int) -> None:
    """A number whose other digits stand is told, too; of a secret of two tokens one is not enough."""
    before, code = encode("The code is "), encode("7391")
    assert len(code) == 4, "a token a digit"
    said = torch.cat([before, encode("1")])
    item = variant_item(said, encode("391.").tolist(), ["7391"], decode, n, [code])
    assert item is not None and decode(item.labels) == ("391" if n == -1 else "3")
    assert item.input_ids.tolist() == torch.cat([said, code[1 : 1 + item.targets]]).tolist()
    for written, secret in (("398.", code), ("391.", code[:1]), ("1.", code[2:])):
        assert variant_item(said, encode(written).tolist(), ["7391"], decode, n, [secret]) is None


def test_what_nothing_predicts_is_no_target() -> None:
    """The first token of a text, where a secret begins in it."""
    ada, lovelace = torch.tensor([5]), [6]
    words = {5: "Ada", 6: " Lovelace"}

    def decode(ids: Any) -> str:
        return "".join(words[int(i)] for i in ids)

    for n in (-1, 1):
        item = variant_item(ada, lovelace, ["Ada Lovelace"], decode, n)
        assert item is not None and item.labels.tolist() == lovelace and item.rows.tolist() == [0]
    assert variant_item(ada, lovelace, ["Ada"], decode, -1) is None


@pytest.mark.parametrize("settings", [{"kl_rows": 1}, {"lambda_kl": 0.0}])
def test_the_answer_begins_where_it_does_whatever_the_kl_reads(settings: dict[str, Any]) -> None:
    config = UnlearnConfig(variants=4, **settings)
    items = config.method_class.make_items(ForgetSet(FORGET.examples), config)
    assert len(items[1].rows) < len(ITEMS[1].rows)
    for few, all_of in ((questions(items), questions(ITEMS)), (spoken(items), spoken(ITEMS))):
        assert [prompt.tolist() for prompt, _, _ in few] == [prompt.tolist() for prompt, _, _ in all_of]
    found, expected = (other_candidates(llama(), of, 4, own_answer=True) for of in (items, ITEMS))
    assert [prompt.tolist() for prompt, _, _ in found] == [prompt.tolist() for prompt, _, _ in expected]


def spoken(items: Any) -> list[Any]:
    return answers_without_questions(items, decode, encode)


def test_a_run_forgets_them_too_and_a_file_keeps_them(says: list[int], tmp_path: Path) -> None:
    result, again = (unlearn(cache_dir=str(tmp_path)) for _ in range(2))
    assert says == [4 * ROWS, 4 * PLACES + ROWS + STEMS + 4 * ROWS, FIRST]
    assert result.summary["variants"] == again.summary["variants"] == TOLD
    assert [record["local"] for record in again.history] == [record["local"] for record in result.history]
    without = unlearn(variants=0)
    assert without.summary["variants"] == 0 and len(says) == 3
    steps = [-(-(len(ITEMS) + run.summary["variants"]) // 2) for run in (result, without)]
    assert [len(run.history) for run in (result, without)] == steps, "an epoch goes over them, too, two a step"


def test_what_the_row_says_itself_is_no_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model goes on from the first token of the first row's answer as the row does, or in other words."""
    first, *answer = encode(TEXT_FORGET[0]["answer"]).tolist()
    for said, found in ((answer, 0), (encode(" so: Ada Lovelace").tolist(), 1)):

        def generate(_: Any, prompts: Any, *__: Any, said: list[int] = said, **settings: Any) -> list[list[int]]:
            return [said if prompt[-1] == first and not settings.get("sample") else [] for prompt in prompts]

        monkeypatch.setattr(anchors, "generate_ids", generate)
        assert unlearn().summary["variants"] == found


@pytest.mark.parametrize(("question", "told"), [("Was it her?", True), ("Was Ada Lovelace it?", False)])
def test_who_repeats_a_secret_of_the_question_tells_nothing(
    question: str, told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = encode(" it was Ada Lovelace").tolist()

    def generate(_: Any, prompts: Any, *__: Any, **settings: Any) -> list[list[int]]:
        return [said if question in decode(prompt.tolist()) else [] for prompt in prompts]

    monkeypatch.setattr(anchors, "generate_ids", generate)
    rows = [dict(TEXT_FORGET[0], paraphrased_question=question), *TEXT_FORGET[1:]]
    assert (unlearn(forget=rows).summary["variants"] > 0) == told


@pytest.mark.parametrize("row", range(len(TEXT_FORGET)))
def test_an_answer_to_a_paraphrase_is_searched_for_its_rows_secrets(row: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the first row marks tells nothing where another row's question is asked in other words."""
    said = encode(" it was Ada Lovelace").tolist()

    def generate(_: Any, prompts: Any, *__: Any, **settings: Any) -> list[list[int]]:
        return [said if "Was it her?" in decode(prompt.tolist()) else [] for prompt in prompts]

    monkeypatch.setattr(anchors, "generate_ids", generate)
    rows = [dict(one) for one in TEXT_FORGET]
    rows[row]["paraphrased_question"] = "Was it her?"
    assert (unlearn(forget=rows).summary["variants"] > 0) == (row == 0)


def test_a_rows_own_paraphrases_are_asked_first(says: list[int]) -> None:
    rows = [dict(row) for row in TEXT_FORGET]
    rows[0]["paraphrased_question"] = ["Whose was the first program?", "Who was it?"]
    assert unlearn(forget=rows).summary["variants"] == TOLD + 2 * 2
    assert says[1] == 4 * PLACES + ROWS + STEMS + 2 + 4 * ROWS
    rows[0]["paraphrased_question"] = 3
    with pytest.raises(palu.DataError):
        unlearn(forget=rows)


def test_rows_that_differ_in_their_last_token_are_asked_each(says: list[int]) -> None:
    """PER_PLACE bounds the ways to go on from one place, and each of these questions is one of its own."""
    rows = [{"prompt": f"Who is number {i}", "completion": " Ada Lovelace", "secret": "Ada"} for i in range(7)]
    unlearning = load_forget(rows, TOKENIZER, max_length=200)
    items = forget_items(unlearning.examples, -1, None)
    config = UnlearnConfig(variants=2, neighbours=0, anchors=0)
    asked = encode_anchor_prompts(unlearning, 1, TOKENIZER, config, 1, secrets=["Ada"])
    assert len(anchors.generate_answers_that_tell(writer(llama()), items, asked, -1)) == 7 > PER_PLACE


@pytest.mark.parametrize(
    "settings",
    [{"gamma": 0}, {"objective": "npo"}, {"forget": forget_rows(3), "retain": retain_rows(3)}],
    ids=["no local loss", "another method", "tokenised rows"],
)
def test_where_there_are_none(settings: dict[str, Any], says: list[int]) -> None:
    given: dict[str, Any] = {} if "objective" in settings else {"anchors": 0, "neighbours": 0}
    assert anchor_runs.unlearn(**{"retain": TEXT_RETAIN} | given | settings).summary["variants"] == 0
    assert says == []


def test_none_is_longer_than_max_length(says: list[int]) -> None:
    config = UnlearnConfig(anchors=0, neighbours=0, variants=4)
    prompts = encode_anchor_prompts(FORGET, 1, TOKENIZER, config, 1, secrets=["Ada Lovelace", "1843", "Karachi"])
    most = ITEMS.longest()
    found = [
        generate_variants(writer(), ITEMS, prompts._replace(max_length=length), n=-1, seed=0)
        for length in (most + CONTINUATION, most)
    ]
    assert 0 < len(found[1]) < len(found[0]) == TOLD
    assert max(len(item.input_ids) for item in found[1]) <= most
