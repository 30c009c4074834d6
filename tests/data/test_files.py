"""palu.files: the same rows from every kind of file; every complaint by its exact words."""

from __future__ import annotations

import csv
import json
import sys
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.small_tokenizers import CHATML, byte_level

from palu.data.examples import load_forget, load_retain
from palu.data.files import DataError, read_rows, write_rows

ROWS: list[dict[str, Any]] = [
    {"question": "Who?", "answer": 'Ada "Lovelace", in\nLondon', "spans": [[0, 3], [5, 13]]},
    {"question": "東京?", "answer": "It is 東京.", "spans": []},
]


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0], delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows({k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()} for row in rows)


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), path)


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def write_json(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("\n" + json.dumps(rows, indent=1) + "\n", encoding="utf-8-sig")


WRITERS = {"jsonl": write_jsonl, "json": write_json, "csv": write_csv, "CSV": write_csv, "tsv": write_csv}
WRITERS["parquet"] = write_parquet


@pytest.mark.parametrize("suffix", WRITERS)
def test_every_format_gives_the_same_examples(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"forget.{suffix}"
    WRITERS[suffix](path, ROWS)
    tokenizer = byte_level()
    expected = load_forget(ROWS, tokenizer, max_length=99)
    loaded = load_forget(path, tokenizer, max_length=99)
    assert loaded.without_span == expected.without_span == 1
    for ours, theirs in zip(loaded.examples, expected.examples, strict=True):
        assert ours.labels.tolist() == theirs.labels.tolist()
    # A tokenised row, whose columns are lists.
    tokens = [{"input_ids": one.input_ids.tolist(), "labels": one.labels.tolist()} for one in expected.examples]
    WRITERS[suffix](path, tokens)
    again = load_forget(path, None, max_length=99)
    assert [one.labels.tolist() for one in again.examples] == [one["labels"] for one in tokens]
    rows = [{"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ada."}]}]
    WRITERS[suffix](path, rows)
    (ours,), (theirs,) = (load_retain(source, byte_level(CHATML), max_length=99).examples for source in (path, rows))
    assert ours.labels.tolist() == theirs.labels.tolist()


def test_rows_are_written_whatever_is_in_a_column(tmp_path: Path) -> None:
    """A date becomes text, an array a list, and half a surrogate pair comes back as it was."""
    path, row = tmp_path / "rows.jsonl", ROWS[1] | {"note": "\ud83d", "born": date(1815, 12, 10)}
    write_rows(path, [row | {"spans": np.array([[0, 2]])}])
    assert list(read_rows(path, "forget")) == [(" (line 1)", row | {"born": "1815-12-10", "spans": [[0, 2]]})]


@pytest.mark.parametrize(
    "content", ['[{"question": "Who?", "answer": "Ada"}]', '[\n{"question":\n"Who?",\n\n"answer": "Ada"}]']
)
def test_a_json_list(content: str, tmp_path: Path) -> None:
    """In one line, or over many; whatever the file is called."""
    path = tmp_path / "data.jsonl"
    path.write_text(content, encoding="utf-8")
    assert list(read_rows(path, "forget")) == [("", {"question": "Who?", "answer": "Ada"})]


def test_data_frames() -> None:
    """As their rows; of rows of several forms each has nothing in the others' columns."""
    pandas = pytest.importorskip("pandas")
    turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ada."}]
    tokens = {"input_ids": [1, 2, 3], "labels": [-100, 2, -200]}
    rows: list[dict[str, Any]] = [*ROWS, {"messages": turns, "secret": "Ada"}, tokens]
    tokenizer = byte_level(CHATML)
    frame = pandas.DataFrame(rows)
    frame["note"] = [1.5, None, float("nan"), pandas.NA]
    arrays = pandas.DataFrame({name: frame[name].map(np.array, na_action="ignore") for name in ("spans", "messages")})
    for given in (frame, frame.assign(**arrays), frame.convert_dtypes()):
        loaded, expected = (load_forget(source, tokenizer, max_length=99).examples for source in (given, rows))
        assert [one.labels.tolist() for one in loaded] == [one.labels.tolist() for one in expected]


def test_csv_rows_know_their_first_line(tmp_path: Path) -> None:
    path = tmp_path / "forget.csv"
    path.write_bytes(b'\xef\xbb\xbfquestion, answer,spans \r\n\r\nWho?,"Ada\r\nLovelace","[[0, 3]]"\r\nWhat?,x,\r\n')
    assert list(read_rows(path, "forget")) == [
        (" (line 3)", {"question": "Who?", "answer": "Ada\r\nLovelace", "spans": [[0, 3]]}),
        (" (line 5)", {"question": "What?", "answer": "x", "spans": None}),
    ]
    with pytest.raises(DataError, match=r"^forget row 1 \(line 5\): column 'secret' \(or 'spans'\) is missing"):
        load_forget(path, byte_level(), max_length=99)


def test_a_csv_cell_of_any_length(tmp_path: Path) -> None:
    """Python's own limit is 131,072 characters; the caller's stays as it was."""
    path, before = tmp_path / "retain.csv", csv.field_size_limit()
    rows = [{"prompt": "", "completion": "The cat sat. " * 20_000}]
    write_csv(path, rows)
    assert [row for _, row in read_rows(path, "retain")] == rows
    assert csv.field_size_limit() == before


def test_bad_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    write_table = pytest.importorskip("pyarrow.parquet").write_table
    path = tmp_path / "data.parquet"
    path.write_text("question,answer\n")
    with pytest.raises(
        DataError, match=r"^retain set: .*data\.parquet is not Parquet, or damaged \(.*; write it again$"
    ):
        load_retain(path, None, max_length=99)
    with pytest.raises(FileNotFoundError, match=r"absent\.parquet"):
        load_retain(tmp_path / "absent.parquet", None, max_length=99)
    write_table(pyarrow.table([["Ada"], ["1815"]], names=["secret", "secret"]), twice := tmp_path / "twice.parquet")
    with pytest.raises(DataError, match=r"twice\.parquet: column 'secret' is there twice; give each column one name$"):
        load_retain(twice, None, max_length=99)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"reading .*data\.parquet needs pyarrow .*; pip install pyarrow$"):
        load_retain(path, None, max_length=99)
