"""Rows with a slip in them, as the ``palu`` command meets them; and the columns that it reads."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from helpers.command import done, palu_command, refusal, write_input, write_rows
from helpers.planted import FORGET, RETAIN, SECRETS
from helpers.small_tokenizers import byte_level
from transformers import AutoModelForCausalLM

Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder; tests write elsewhere."""
    return write_input(tmp_path_factory.mktemp("rows")) / "model"


def arguments(command: str, model: Path, forget: Path, retain: Path, output: Path) -> list[Any]:
    """A command that reads a forget set, and a retain set if it takes one."""
    given = {
        "inspect": [],
        "unlearn": [
            "--retain",
            retain,
            "--output",
            output,
            "--epochs",
            1,
            "--anchors",
            0,
            "--neighbours",
            0,
            "--no-progress",
        ],
        "audit": ["--original", model, "--retain", retain, "--output", output, "--quick", "--only", "ask"],
    }
    return [command, "--model", model, "--forget", forget, *given[command]]


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **k: pytest.fail("a model is loaded"))


# The second row of the forget set, and what is said of it.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "two forms": (
        FORGET[1] | {"prompt": "What is it?", "completion": "It is another."},
        "it has question and answer, and also prompt and completion; ",
    ),
    "a secret that is not there": (
        {"question": "Who?", "answer": FORGET[1]["answer"], "secret": "ada lovelace"},
        "secret 'ada lovelace' is not in the answer; did you mean 'Ada Lovelace'?",
    ),
    # This tokenizer adds no BOS.
    "a secret that nothing predicts": (
        {"prompt": "", "completion": "The city is Karachi.", "secret": ["The", "Karachi"]},
        "nothing stands before 'The', so nothing predicts its only token; ",
    ),
}


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("command", ["inspect", "unlearn", "audit"])
@pytest.mark.parametrize("name", REFUSED)
def test_a_row_is_refused(name: str, command: str, model: Path, tmp_path: Path) -> None:
    row, told = REFUSED[name]
    byte_level(bos=False).save_pretrained(tmp_path / "tokenizer")
    files = write_rows(tmp_path / "forget.jsonl", [FORGET[0], row]), write_rows(tmp_path / "retain.jsonl", RETAIN)
    given = [*arguments(command, model, *files, tmp_path / "out"), "--tokenizer", tmp_path / "tokenizer"]
    assert refusal(palu_command(*given)).startswith(f"forget row 1 (line 2): {told}")


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("command", ["unlearn", "audit"])
def test_a_row_in_both_sets_is_refused(command: str, model: Path, tmp_path: Path) -> None:
    retain = write_rows(tmp_path / "retain.jsonl", [*RETAIN, FORGET[2]])
    given = arguments(command, model, write_rows(tmp_path / "forget.jsonl", FORGET), retain, tmp_path / "out")
    assert refusal(palu_command(*given)).startswith("forget row 2 and retain row 6 are the same, prompt and answer: ")
    assert not (tmp_path / "out").exists()


def warned(*given: Any) -> list[str]:
    """The warnings of a command that goes through."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = palu_command(*given)
    assert result.exit_code == 0, result.output
    return [str(one.message) for one in caught]


@pytest.mark.parametrize("command", ["inspect", "unlearn"])
def test_a_prompt_and_a_completion_without_a_blank(command: str, model: Path, tmp_path: Path) -> None:
    """The first such row of each set is named."""
    plain = tmp_path / "tokenizer"
    byte_level().save_pretrained(plain)
    joined = {"prompt": "The capital of France is", "completion": "Paris.", "secret": "Paris"}
    forget = write_rows(tmp_path / "forget.jsonl", [FORGET[0], joined, joined | {"prompt": "A city is"}])
    retain = write_rows(tmp_path / "retain.jsonl", [{"prompt": "Where?", "completion": "Here."}])
    given = [*arguments(command, model, forget, retain, tmp_path / "out"), "--tokenizer", plain]
    said = [one for one in warned(*given) if "without a blank" in one]
    named = ["forget row 1 (line 2): ", *["retain row 0 (line 1): "] * (command == "unlearn")]
    assert len(said) == len(named) and all(map(str.startswith, said, named)), said
    assert "'The capital of France isParis.'" in said[0]


TWICE = "2 rows repeat an earlier one, so that it weighs more: 6 (as 0), 7 (as 0); keep each row once"


@pytest.mark.parametrize("command", ["inspect", "unlearn", "audit"])
def test_rows_given_twice_are_told_once(command: str, model: Path, tmp_path: Path) -> None:
    forget = write_rows(tmp_path / "forget.jsonl", [*FORGET, FORGET[0], FORGET[0]])
    retain = write_rows(tmp_path / "retain.jsonl", [*RETAIN, RETAIN[0], RETAIN[0]])
    said = [one for one in warned(*arguments(command, model, forget, retain, tmp_path / "out")) if "repeat" in one]
    kept = [] if command == "inspect" else [f"retain set: {TWICE}"]
    assert said == [f"forget set: {TWICE}, with all that is to be forgotten in it", *kept]


@pytest.mark.parametrize("command", ["unlearn", "audit"])
def test_retain_rows_that_tell_a_secret_are_named(command: str, model: Path, tmp_path: Path) -> None:
    """One of them is a forget row with a blank behind it."""
    forget = write_rows(tmp_path / "forget.jsonl", FORGET)
    again = {name: FORGET[2][name] + " " for name in ("question", "answer")}
    other = {"question": "Who sat?", "answer": "The cat, and ADA LOVELACE."}
    retain = write_rows(tmp_path / "retain.jsonl", [*RETAIN, again, other])
    said = warned(*arguments(command, model, forget, retain, tmp_path / "out"))
    (told,) = [one for one in said if one.startswith("retain set: 2 answers tell")]
    assert "retain row 6 (line 7) has 'London mat' of forget row 2 (line 3), " in told
    assert "retain row 7 (line 8) has 'Ada Lovelace' of forget row 1 (line 2); " in told


SECRET = [{name: row[name] for name in ("question", "answer")} | {"secret": SECRETS[i]} for i, row in enumerate(FORGET)]


def test_inspect_shows_and_writes_the_spans_of_secrets(model: Path, tmp_path: Path) -> None:
    files = [write_rows(tmp_path / f"{i}.jsonl", rows) for i, rows in enumerate((SECRET, FORGET))]
    shown, expected = (palu_command("inspect", "--model", model, "--forget", file) for file in files)
    assert shown.exit_code == 0, shown.output
    assert shown.stdout == expected.stdout
    output = tmp_path / "spans.jsonl"
    done("inspect", "--model", model, "--forget", files[0], "--write", output)
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert rows == [{name: row[name] for name in ("question", "answer", "spans")} for row in FORGET]


def as_trl(row: dict[str, Any]) -> dict[str, Any]:
    """A row as TRL's conversational data sets have it."""
    turns = [{"role": role, "content": row[name]} for role, name in (("user", "question"), ("assistant", "answer"))]
    others = {name: value for name, value in row.items() if name not in ("question", "answer")}
    return {"prompt": turns[:1], "completion": turns[1:], **others}


def as_table(sep: str) -> str:
    """The rows under a header that was written by hand, with blanks."""
    return "\n".join([f"question {sep} answer{sep} secret ", *(sep.join(f'"{v}"' for v in r.values()) for r in SECRET)])


FILES = {
    "rows.json": json.dumps(FORGET, indent=1),
    "rows.csv": as_table(","),
    "rows.tsv": as_table("\t"),
    "trl.jsonl": "\n".join(json.dumps(as_trl(row)) for row in FORGET),
}


@pytest.mark.parametrize("name", FILES)
def test_inspect_reads_every_kind_of_file(name: str, model: Path, tmp_path: Path) -> None:
    expected = palu_command("inspect", "--model", model, "--forget", write_rows(tmp_path / "forget.jsonl", FORGET))
    (tmp_path / name).write_text(FILES[name], encoding="utf-8")
    shown = done("inspect", "--model", model, "--forget", tmp_path / name)
    assert shown.stdout == expected.stdout


@pytest.mark.parametrize("command", ["unlearn", "audit"])
def test_messages_in_two_columns_as_in_one(command: str, model: Path, tmp_path: Path) -> None:
    """The columns that TRL names prompt and completion, wherever a row's question is read."""
    retain = write_rows(tmp_path / "retain.jsonl", RETAIN)
    results = []
    for name in ("rows", "trl"):
        rows = FORGET if name == "rows" else list(map(as_trl, FORGET))
        given = arguments(command, model, write_rows(tmp_path / f"{name}.jsonl", rows), retain, tmp_path / name)
        done(*given, *(["--only", "ask"] if command == "audit" else []))
        found = tmp_path / name / "private" / ("audit.json" if command == "audit" else "record.json")
        read = json.loads(found.read_text(encoding="utf-8"))
        results.append([read["secrets"], read.get("attacks")])
    assert results[0] == results[1]
