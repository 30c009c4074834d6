"""The sets of a run as palu.unlearn takes them: text and tokens, what is cut off, what is not read at all."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.runs import TEXT_FORGET, TEXT_RETAIN, assert_same_run, unlearn
from helpers.small_tokenizers import CHATML, DATED, byte_level, sentencepiece
from helpers.tiny import forget_rows, retain_rows, tiny_llama

import palu
from palu.config import UnlearnConfig
from palu.data.examples import load_forget
from palu.data.rows import Renderer
from palu.methods import METHODS
from palu.ref_model.anchors import anchor_texts
from palu.ref_model.precompute import precompute_reference
from palu.report.recorder import GENERAL
from palu.training import loop


@pytest.mark.parametrize("build", [lambda: byte_level(), lambda: sentencepiece(CHATML)])
def test_text_and_spans(build: Callable, tmp_path: Path) -> None:
    tokenizer = build()
    vocab = len(tokenizer)
    given: dict[str, Any] = {"tokenizer": tokenizer, "neighbours": 0, "variants": 0}  # tokenised rows have none
    (tmp_path / "forget.jsonl").write_text("\n".join(map(json.dumps, TEXT_FORGET)))
    (tmp_path / "retain.jsonl").write_text("\n".join(map(json.dumps, TEXT_RETAIN)))
    tokenised = [
        {"input_ids": e.input_ids, "labels": e.labels}
        for e in load_forget(TEXT_FORGET, tokenizer, max_length=1024).examples
    ]
    from_dicts, from_files, from_tokens = (
        unlearn(tiny_llama(vocab_size=vocab), None, forget, retain, **given)
        for forget, retain in (
            (TEXT_FORGET, TEXT_RETAIN),
            (tmp_path / "forget.jsonl", str(tmp_path / "retain.jsonl")),
            (tokenised, TEXT_RETAIN),
        )
    )
    assert from_dicts.summary["forget_examples"] == 3
    assert from_dicts.summary["forget_without_span"] == 1
    assert from_dicts.summary["retain_examples"] == 2
    for other in (from_files, from_tokens):
        assert_same_run(from_dicts, other, 0 if from_dicts.summary["device"] == "cpu" else 1e-5)


def test_examples_without_a_span_enter_the_kl_alone() -> None:
    plain = [
        {"input_ids": row["input_ids"], "labels": [x if x < 0 else -200 for x in row["labels"]]}
        for row in forget_rows(3, seed=5)
    ]
    result, only = (
        unlearn(tiny_llama(), tiny_llama(seed=3), rows, [], epochs=1, batch_size=5, lambda_retain=0)
        for rows in (forget_rows(2) + plain, forget_rows(2))
    )
    assert result.summary["forget_without_span"] == 3
    assert only.summary["forget_without_span"] == 0
    assert result.summary["onset_tokens"] == only.summary["onset_tokens"]
    added = sum(label == -200 for row in plain for label in row["labels"])
    assert result.summary["ordinary_tokens"] == only.summary["ordinary_tokens"] + added
    assert result.history[0]["local"] == pytest.approx(only.history[0]["local"], rel=1e-5)
    assert result.history[0]["kl"] != pytest.approx(only.history[0]["kl"], rel=1e-3)
    assert result.history[0]["retain"] == 0


def test_rows_that_are_cut_off_are_counted() -> None:
    long, first, last = (
        {"input_ids": list(range(start, start + 60)), "labels": [-100] * 50 + list(range(start + 50, start + 60))}
        for start in range(3)
    )
    forget, retain = [*forget_rows(3), long], [first, *retain_rows(4), last]
    result = unlearn(tiny_llama(), None, forget, retain, epochs=1, max_length=40, allow_cut_spans=True)
    assert (result.summary["forget_examples"], result.summary["forget_skipped"]) == (3, 1)
    assert (result.summary["forget_spans_cut"], result.summary["forget_all_spans_cut"]) == (1, 0)
    assert (result.summary["retain_examples"], result.summary["retain_skipped"]) == (4, 2)


def test_every_text_is_rendered_with_the_values_for_the_chat_template(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of both sets, of the alternate answers, of the anchors' prompts and of the record."""
    tokenizer = byte_level(DATED)
    seen: list[tuple[str, Any]] = []
    render = tokenizer.apply_chat_template

    def record(conversation: Any, **kwargs: Any) -> Any:
        seen.append((conversation[0]["content"], kwargs.get("date_string")))
        return render(conversation, **kwargs)

    monkeypatch.setattr(tokenizer, "apply_chat_template", record)
    config = UnlearnConfig(epochs=1, progress=False, chat_template_kwargs={"date_string": "26 Jul 2024"})
    model = tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=256)
    palu.Recorder(model, TEXT_FORGET, TEXT_RETAIN, tokenizer=tokenizer, config=config)
    everyday, rows = set(anchor_texts()), {row["question"] for row in TEXT_FORGET + TEXT_RETAIN}
    assert {question for question, _ in seen} == rows | set(anchor_texts()[-GENERAL:])
    palu.unlearn(model, None, TEXT_FORGET, TEXT_RETAIN, tokenizer=tokenizer, config=config)
    assert len({question for question, _ in seen} & everyday) == GENERAL + 4, "anchors, too"
    forget = [{**row, "alternate": "No."} for row in TEXT_FORGET]
    palu.unlearn(model, None, forget, TEXT_RETAIN, tokenizer=tokenizer, config=config, objective="dpo")
    unmarked, values = {"question": "Who?", "answer": "Ada."}, {"chat_template_kwargs": config.chat_template_kwargs}
    palu.annotate([unmarked, TEXT_FORGET[0]], "contrast", model, tokenizer, progress=False, **values)
    assert {date for _, date in seen} == {"26 Jul 2024"}


def test_a_prompt_that_generation_does_not_give_is_told_once() -> None:
    thought = "{% if m.role == 'assistant' %}<think></think>{% endif %}"
    tokenizer = byte_level(CHATML.replace("{{ m['content'] }}", thought + "{{ m['content'] }}"))
    model = tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=256)
    with pytest.warns(UserWarning, match="prompt for generation") as caught:
        unlearn(model, None, TEXT_FORGET, TEXT_RETAIN, tokenizer=tokenizer, epochs=1)
    told = [str(one.message) for one in caught if "prompt for generation" in str(one.message)]
    assert [one.partition(":")[0] for one in told] == ["forget row 0", "retain row 0"]


@pytest.mark.parametrize(
    ("off", "fields", "copies_head"),
    [
        ({"gamma": 0}, {"hidden"}, True),
        ({"lambda_kl": 0}, {"index"}, False),
        ({"gamma": 0, "lambda_kl": 0}, set(), False),
        ({"gamma": 0, "objective": "npo"}, set(), False),
        ({"gamma": 0, "objective": "tpo"}, set(), False),
        ({"gamma": 0, "objective": "undial", "lambda_retain": 1}, set(), False),
    ],
)
def test_a_term_of_weight_0_costs_nothing(
    off: dict[str, Any], fields: set[str], copies_head: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """No rows, nothing of the reference and no copy of its head; its figure is 0. Also from the cache on disk."""
    kept: list[Any] = []

    def spy(*args: Any, **kwargs: Any) -> Any:
        kept.append(precompute_reference(*args, **kwargs))
        return kept[-1]

    monkeypatch.setattr(loop, "precompute_reference", spy)
    on = {"objective": off.get("objective", "palu"), "cache_dir": str(tmp_path), "epochs": 1}
    unlearn(tiny_llama(), None, forget_rows(), retain_rows(), **on)
    for _ in range(2):
        result = unlearn(tiny_llama(), None, forget_rows(), retain_rows(), **on | off)
        cache, head = kept[-1]
        assert set(cache.outputs[0]) == fields
        assert (head is not None) == copies_head
    names = {"gamma": METHODS[on["objective"]].terms[0], "lambda_kl": "kl"}
    for setting in off.keys() & names.keys():
        assert all(record[names[setting]] == 0 for record in result.history)
    assert result.history[-1]["retain"] > 0
    if on["objective"] == "palu":
        assert (result.summary["ordinary_tokens"] > 0) == ("lambda_kl" not in off)
        assert (result.summary["onset_tokens"] > 0) == ("gamma" not in off)


def test_a_retain_set_of_weight_0_is_not_tokenised(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_level(bos=False)
    rendered: list[Any] = []
    original = Renderer.render

    def render(self: Renderer, row: int, where: str, columns: Any, *args: Any, **kwargs: Any) -> Any:
        rendered.append(columns)
        return original(self, row, where, columns, *args, **kwargs)

    monkeypatch.setattr(Renderer, "render", render)
    for weight, expected in ((0, 0), (1, len(TEXT_RETAIN))):
        rendered.clear()
        model = tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=512)
        settings = {"tokenizer": tokenizer, "lambda_retain": weight, "epochs": 1}
        settings |= {"anchors": 2, "neighbours": 0, "variants": 0}
        result = unlearn(model, None, TEXT_FORGET, TEXT_RETAIN, **settings)
        summary = result.summary
        assert (result.history[0]["retain"] > 0) == (weight > 0)
        assert sum(columns in TEXT_RETAIN for columns in rendered) == expected == summary["retain_examples"]
        assert sum(columns in TEXT_FORGET for columns in rendered) == len(TEXT_FORGET)
        assert summary["anchors"] + summary["anchors_skipped"] == 2
