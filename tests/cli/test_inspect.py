"""``palu inspect``: roles of tokens, spans that it finds; and the rows that every command reads, or warns of."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
from helpers.command import Commands, done, palu_command, read, read_rows, refusal, write_rows
from helpers.planted import FORGET, RETAIN, SECRETS
from helpers.small_tokenizers import byte_level


def test_inspect(folder: Path, tmp_path: Path) -> None:
    common = ["inspect", "--model", folder / "model", "--forget", folder / "forget.jsonl"]
    result = done(*common, "--n", 1)
    assert "\x1b" not in result.stdout, "no colours where there is no terminal"
    assert re.search(r"It is «H.*» <.*n>, far away\.<\|im_end\|>", result.stdout)
    assert re.search(r"6 rows \(0 without a span, 0 skipped\); tokens at n = 1: 6 onset, \d+ redundant", result.stdout)
    whole = done(*common, "--n", -1)
    assert re.findall("^row (.)", whole.stdout, re.MULTILINE) == [*"012345"]
    assert "| L" in whole.stdout
    assert " 0 redundant" in whole.stdout

    html = tmp_path / "roles.html"
    done(*common, "--n", 3, "--html", html)
    page = html.read_text(encoding="utf-8")
    assert page.count("<h2>Row ") == 6
    assert "tokens at n = 3: " in page
    assert not re.search("https?://|<script|<link|src=", page), "self-contained"


def test_the_first_rows_are_shown(folder: Path, tmp_path: Path) -> None:
    rows = [row | {"question": f"{row['question']} {i}"} for row in FORGET for i in range(2)]
    many = write_rows(tmp_path / "many.jsonl", rows)
    common = ["inspect", "--model", folder / "model", "--forget", many]
    said = done(*common).stdout
    assert said.count("\nrow ") == 10
    assert said.endswith("2 more rows: --html FILE\n")


@pytest.mark.parametrize("how", ["regex:" + "|".join(SECRETS), "contrast"])
def test_spans_are_found_shown_and_written(how: str, folder: Path, tmp_path: Path) -> None:
    asked, written = ["inspect", "--model", folder / "model"], tmp_path / "marked.jsonl"
    asked += ["--forget", folder / "unmarked.jsonl"]
    result = done(*asked, "--annotate", how, "--write", written)
    assert "«" in result.stdout
    found = read_rows(written)
    if how == "contrast":  # the model itself tells them
        assert [row["answer"] for row in found] == [row["answer"] for row in FORGET]
        assert any(row["spans"] for row in found)
    else:
        assert found == FORGET
    assert "spans" in refusal(palu_command(*asked)), "without it the column is missing"


# --- rows, as every command meets them ---
def warned(*arguments: Any) -> list[str]:
    """The warnings of a command that goes through."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        done(*arguments)
    return [str(one.message) for one in caught]


@pytest.mark.parametrize("command", ["inspect", "unlearn", "audit"])
def test_slips_are_told_once(command: str, commands: Commands, tmp_path: Path) -> None:
    """Of a prompt and a completion without a blank the first row of each set, every row that is there twice, and
    retain rows that tell a secret: one of them is a forget row with a blank behind it."""
    plain = tmp_path / "tokenizer"
    byte_level().save_pretrained(plain)
    joined = {"prompt": "The capital of France is", "completion": "Paris.", "secret": "Paris"}
    again = {name: FORGET[2][name] + " " for name in ("question", "answer")}
    other = {"question": "Who sat?", "answer": "The cat, and ADA LOVELACE."}
    parted = {"prompt": "Where?", "completion": "Here."}
    forget_rows = [*FORGET, FORGET[0], FORGET[0]]
    retain_rows = [*RETAIN, RETAIN[0], RETAIN[0], again, other]
    arguments = [*commands[command], "--forget", tmp_path / "forget.jsonl"]
    blanks = command != "audit"
    if blanks:
        forget_rows += [joined, joined | {"prompt": "A city is"}]
        retain_rows.append(parted)
        arguments += ["--tokenizer", plain]
    write_rows(tmp_path / "forget.jsonl", forget_rows)
    retain = write_rows(tmp_path / "retain.jsonl", retain_rows)
    both = command != "inspect"  # which takes no rows to retain
    said = warned(*arguments, *(["--retain", retain] if both else []))

    if blanks:
        found = [one for one in said if "without a blank" in one]
        named = ["forget row 8 (line 9): ", *["retain row 10 (line 11): "] * both]
        assert len(found) == len(named) and all(map(str.startswith, found, named)), found
        assert "'The capital of France isParis.'" in found[0]
    twice = "2 rows repeat an earlier one, so that it weighs more: 6 (as 0), 7 (as 0); keep each row once"
    found = [one for one in said if "repeat" in one]
    assert found == [f"forget set: {twice}, with all that is to be forgotten in it", *[f"retain set: {twice}"] * both]
    found = [one for one in said if one.startswith("retain set: 2 answers tell")]
    assert len(found) == both
    for told in found:
        assert "retain row 8 (line 9) has 'London mat' of forget row 2 (line 3), " in told
        assert "retain row 9 (line 10) has 'Ada Lovelace' of forget row 1 (line 2); " in told


SECRET = [{name: row[name] for name in ("question", "answer")} | {"secret": SECRETS[i]} for i, row in enumerate(FORGET)]


def test_inspect_writes_the_spans_of_secrets(folder: Path, tmp_path: Path) -> None:
    secret, output = write_rows(tmp_path / "secret.jsonl", SECRET), tmp_path / "spans.jsonl"
    asked = ["inspect", "--model", folder / "model", "--forget", secret, "--write", output]
    done(*asked)
    assert read_rows(output) == [{name: row[name] for name in ("question", "answer", "spans")} for row in FORGET]


def as_trl(row: dict[str, Any]) -> dict[str, Any]:
    """A row as TRL's conversational data sets have it."""
    turns = [{"role": role, "content": row[name]} for role, name in (("user", "question"), ("assistant", "answer"))]
    others = {name: value for name, value in row.items() if name not in ("question", "answer")}
    return {"prompt": turns[:1], "completion": turns[1:], **others}


@pytest.mark.parametrize(("command", "written"), [("unlearn", "record.json"), ("audit", "audit.json")])
def test_messages_in_two_columns_as_in_one(command: str, written: str, commands: Commands, tmp_path: Path) -> None:
    """The columns that TRL names prompt and completion, wherever a row's question is read."""
    results = []
    for name, rows in (("rows", FORGET), ("trl", list(map(as_trl, FORGET)))):
        forget = write_rows(tmp_path / f"{name}.jsonl", rows)
        done(*commands[command], "--forget", forget, "--output", tmp_path / name)
        found = read(tmp_path / name / "private" / written)
        results.append([found["secrets"], found.get("attacks")])
    assert results[0] == results[1]
