"""The redacted report: no marked text is in the file, whatever the tokenizer, the punctuation and the place."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import cache
from html import escape, unescape
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from helpers.report_runs import RETAIN, change, perform, write
from helpers.small_tokenizers import CHATML, byte_level, sentencepiece
from helpers.tiny import forget_rows, tiny_llama
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import palu
from palu import Recorder, UnlearnConfig, write_card, write_report
from palu.cli import app
from palu.report import recorder

MASK = "███"
TOKENIZERS: dict[str, Any] = {
    "plain": lambda: byte_level(None),
    "chat": lambda: byte_level(CHATML, bos=False, trim_offsets=True),
    "no words": lambda: byte_level(None, split=False),
    "prefix": lambda: byte_level(None, add_prefix_space=True),
    "sentencepiece": lambda: sentencepiece(None),
}


@cache
def model_of(name: str) -> tuple[Any, Any]:
    """A tokenizer with tokens that reach beyond a word, as Qwen's has, and a model for it."""
    tokenizer = TOKENIZERS[name]()
    tokenizer.add_tokens(["-Lena", "($7", "391).", "Zoë's", "0199,"])
    return tokenizer, tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=512)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a run, whose record is to be replaced."""
    folder = tmp_path_factory.mktemp("run")
    config = UnlearnConfig(epochs=1, lambda_retain=0.0, progress=False)
    perform(folder, model=tiny_llama(), forget=forget_rows(2), retain=[], tokenizer=None, config=config)
    with patch.object(recorder, "MAX_NEW_TOKENS", 1):
        yield folder


def record(folder: Path, name: str, forget: list[dict[str, Any]], retain: Any = RETAIN) -> None:
    tokenizer, model = model_of(name)
    config = UnlearnConfig(max_length=512, progress=False)
    Recorder(model, forget, retain, tokenizer=tokenizer, config=config).save(folder, model)


def contents(path: Path) -> str:
    """The file's text, its escapes undone, and what is left without the tags, in small letters; without hashes."""
    source = re.sub("[0-9a-f]{64}", "", path.read_text(encoding="utf-8"))
    if path.suffix == ".html":
        source = re.sub("(?=<[a-z/!])", "\0", source)  # a tag's "<" goes on with no text
    return "\n".join([source, unescape(source), unescape(re.sub("<[^>]*>", "", source))]).casefold()


def forms(secret: str) -> set[str]:
    number = re.sub(r"\D", "", secret)
    written = {secret, escape(secret), json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1]}
    return {form.casefold() for form in written | ({number} if len(number) > 3 else set())}


def test_marked_characters_are_blotted_out_not_tokens(folder: Path) -> None:
    answer = "It is Anna-Lena, for ($7,391)."
    told = {"question": "How old is Lena, or lena, who paid 7391?", "answer": answer, "secret": ["Lena", "$7,391"]}
    record(folder, "chat", [told | {"question": "Who?"}, told])
    assert CliRunner().invoke(app, ["report", str(folder), "--redact"]).exit_code == 0
    text = contents(folder / "private" / "report-redacted.html")
    assert f"how old is {MASK}, or {MASK}, who paid {MASK}?" in text and "it is anna" in text
    assert not any(form in text for form in ("lena", "7,391", "7391"))
    assert "-Lena" in (folder / "private" / "record.json").read_text(encoding="utf-8"), "else the token tells nothing"


# Some with what HTML and JSON escape, some that a tokenizer cuts, some without a word.
SECRETS = ["Lena", "$7,391", "7391", "O'Neil", "Zoë", "<Ava & Bob>", 'Jo "Q" Ray', "東京", "दिन", "555-0199", "X\\y"]
SECRETS.append("C+😀")
WRITTEN = {
    "as it is": str,
    "large": str.upper,
    "small": str.lower,
    "HTML": escape,
    "JSON": lambda text: json.dumps(text)[1:-1],
    "within a word": lambda text: f"un{text}ly",
}
secrets = st.sampled_from(SECRETS) | st.text("Zkqé$&<'\" -", min_size=3, max_size=8).map(str.strip)
joints = st.sampled_from(["", " ", "-", ", ", " ($", "(", ").", "\n", "'s ", ". The "])


@st.composite
def rows(draw: st.DrawFn) -> dict[str, Any]:
    """A row whose answer is a chain of secrets and what stands between them, perhaps nothing."""
    answer, spans = draw(st.sampled_from(["It is ", "", "The city of Anna"])), []
    for secret in draw(st.lists(secrets.filter(bool), min_size=1, max_size=3)):
        answer += draw(joints)
        spans.append([len(answer), len(answer) + len(secret)])
        answer += secret
    return {"question": "", "answer": answer + draw(joints), "spans": spans}


def write_both(folder: Path, name: str, forget: list[dict[str, Any]], text: str) -> str:
    """Redacted report and model card of a run whose every text, of the user's and of files, has this one in it."""
    record(folder, name, forget, [{"question": f"Where is {text}?", "answer": f"I know {text}."}])

    def everywhere(found: dict[str, Any]) -> None:
        found["model"]["name"] = found["device"] = found["data"]["retain"]["file"] = text
        found["hashes"]["files"] = {text: "0"}
        found["answers"]["retain"][0]["after"] = f"It is {text}."

    change(folder, everywhere)
    change(folder, lambda found: found["config"].update(chat_template_kwargs={text: [text]}), "summary.json")
    results = {text: {"agg_value": None, "reason": text}, "palu": {"benchmark": text}}
    write(folder, results, "evaluation.json")
    write(folder, {"step": 1, text: 1.0}, "history.jsonl")
    return contents(write_report(folder, redact=True)) + contents(write_card(folder))


@pytest.fixture(scope="module")
def is_palus(folder: Path) -> Callable[[str], bool]:
    """Whether palu itself writes a text into report or card."""
    return write_both(folder, "plain", [{"question": "?", "answer": "!!", "spans": [[0, 1]]}], "").__contains__


@example("plain", [{"question": "", "answer": "It is Zoë.", "spans": [[6, 9]]}], "JSON")
@example("plain", [{"question": "", "answer": "It is Éva.", "spans": [[6, 9]]}], "JSON")
@example("prefix", [{"question": "", "answer": "The city of Anna ($$<-", "spans": [[19, 21]]}], "HTML")
@settings(max_examples=40, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(st.sampled_from(sorted(TOKENIZERS)), st.lists(rows(), min_size=1, max_size=2), st.sampled_from(sorted(WRITTEN)))
def test_no_secret_is_in_the_file(
    folder: Path, is_palus: Callable[[str], bool], name: str, forget: list[dict[str, Any]], written: str
) -> None:
    """In whatever text it stands: questions, answers, names of files and figures, settings; nor in the model card."""
    secrets = sorted({row["answer"][start:end].strip() for row in forget for start, end in row["spans"]})
    text = "; ".join(map(WRITTEN[written], secrets))
    told = [row | {"question": f"Who knows {text}?"} for row in forget]
    page = write_both(folder, name, [*forget, *told], text)
    assert [(s, form) for s in secrets for form in forms(s) if form in page and not is_palus(form)] == []


def test_secrets_that_overlap_or_are_in_other_sets(folder: Path) -> None:
    """Each secret of the column counts, also where its span is one with others'; and what audit and evaluation mark."""
    row = {"question": "Who?", "answer": "Ada Lovelace wrote it.", "secret": ["Ada Lovelace", "Lovelace wrote"]}
    told = "I met Ada Lovelace, Basil O'Neil, Zoë Kent, Jo Ray and Ida Moss."
    record(folder, "plain", [row], [{"question": told, "answer": "Yes."}])
    tokenizer, model = model_of("plain")
    answer = "Basil O'Neil met Zoë Kent."
    audited = [{"question": "Was it Zoë Kent?", "answer": answer, "secret": "Zoë Kent"}]  # which its question tells
    audited += [{"question": "Who was it?", "answer": answer, "secret": ["Basil O'Neil", "O'Neil met"]}]
    quick: dict[str, Any] = {"only": ["ask"], "quick": True, "max_new_tokens": 1, "progress": False}
    palu.audit(model, deepcopy(model), audited, tokenizer=tokenizer, folder=folder / "private", **quick)
    evaluated = {"questions": ("Jo Ray Fox.", ["Jo Ray", "Ray Fox"]), "mine": ("Ida Moss Hall.", ["Ida Moss"])}
    for name, (answer, secret) in evaluated.items():
        rows = [{"question": f"Who is in {name}?", "answer": answer, "secret": secret}]
        results = palu.evaluate.questions(model, tokenizer, rows, max_new_tokens=1, progress=False)
        write(folder, results, f"evaluation-{name}.json")
    text = contents(write_report(folder, redact=True))
    for name in ("audit", *(f"evaluation-{name}" for name in evaluated)):
        (folder / "private" / f"{name}.json").unlink()
    assert f"i met {MASK}, {MASK}, {MASK}, {MASK} and {MASK}." in text
    assert "who is in questions?" in text and "who is in mine?" in text


def test_a_secret_that_begins_in_one_run_of_tokens_and_ends_in_another(folder: Path) -> None:
    rows = [
        {"question": "Who?", "answer": "Ada Lovelace wrote it.", "secret": "Ada Lovelace"},
        {"question": "Whose?", "answer": "It is Ada Lovelace's.", "spans": [[6, 9]]},
    ]
    record(folder, "plain", rows)
    text = contents(write_report(folder, redact=True))
    assert "lovelace" not in text and "it is" in text


def test_tokens_that_are_marked_are_read_as_text(folder: Path) -> None:
    tokenizer, _ = model_of("plain")
    ids = tokenizer("It is Ada Lovelace.")["input_ids"]
    first, last = (len(tokenizer(text)["input_ids"]) for text in ("It is", "It is Ada Lovelace"))
    labels = [-100, *([-200] * (first - 1)), *ids[first:last], *([-200] * (len(ids) - last))]
    asked = [{"question": "Who is ada lovelace?", "answer": "A"}]
    record(folder, "plain", [{"input_ids": ids, "labels": labels}], asked)
    text = contents(write_report(folder, redact=True))
    assert f"who is {MASK}?" in text and "lovelace" not in text
