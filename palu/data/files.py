"""Read rows from a file: JSONL, JSON, CSV, TSV or Parquet, by its suffix; docs/data.md says what each holds."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
_LONGEST_CELL = 2**31 - 1  # characters, the most that every platform takes; the module's own limit is 131,072
_LISTS = ("spans", "messages", "input_ids", "labels", "attention_mask")
_TEXTS = ("secret", "paraphrased_question", "also_asked")  # a text, or a list of texts


class DataError(ValueError):
    """The user's data cannot be used. The message names set, row, column or span, and the fix."""


def read_rows(path: Path, name: str) -> Iterator[tuple[str, Any]]:
    """Yield (where it is, such as " (line 3)", the row) for each row of a file; ``name``: the set's, for errors.

    Raises DataError, naming file and line, where the file is not what its suffix says; FileNotFoundError and other
    OSErrors; ImportError where Parquet wants a package.
    """
    if path.is_dir():
        raise DataError(f"{name} set: {path} is a folder; give a file, or datasets.load_from_disk of it")
    readers: dict[str, Any] = {".csv": _csv, ".tsv": partial(_csv, delimiter="\t"), ".parquet": _parquet}
    return readers.get(path.suffix.lower(), _json)(path, name)


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as JSONL."""
    lines = json_lines(rows)  # before the file is opened, which may hold something
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def json_lines(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Write each row as a line of JSON: an array as a list, and what JSON has no form for, such as a date, as text."""

    def plain(value: Any) -> Any:
        return value.tolist() if hasattr(value, "tolist") else str(value)

    lines = (json.dumps(dict(row), ensure_ascii=False, default=plain) for row in rows)
    # Half a surrogate pair, in a column that nobody reads, is written as JSON escapes it.
    return [line.encode("utf-8", "backslashreplace").decode() for line in lines]


def _lines(path: Path, name: str) -> Iterator[tuple[str, str, str]]:
    """Yield (where it is, the same for errors, text) for each line."""
    # Read as bytes: a line ends at "\n" alone, and bad UTF-8 is reported with its line number.
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            subject = f"{name} line {number} of {path}"
            try:
                yield f" (line {number})", subject, line.decode("utf-8-sig")
            except UnicodeDecodeError:
                fix = "give JSONL, JSON, CSV, TSV (as UTF-8) or Parquet"
                raise DataError(f"{subject}: not UTF-8 text; {fix}") from None


def _json(path: Path, name: str) -> Iterator[tuple[str, Any]]:
    lines, first = _lines(path, name), True
    for where, subject, text in lines:
        if not text.strip():
            continue
        is_list = first and text.lstrip().startswith("[")
        first = False
        if is_list:
            text += "".join(line for _, _, line in lines)
        try:
            value = json.loads(text.rstrip(), object_pairs_hook=partial(_each_once, subject=subject))
        except json.JSONDecodeError as error:
            problem = str(error) if is_list else f"{error.msg} at column {error.colno}"
            fix = "write one JSON object per line, or one list of them"
            raise DataError(f"{subject}: not JSON ({problem}); {fix}") from None
        yield from [("", row) for row in value] if is_list else [(where, value)]


def _each_once(pairs: Sequence[tuple[str, Any]], subject: str) -> dict[str, Any]:
    """Make a row of columns and values. Raises DataError where a column comes twice."""
    names = [name for name, _ in pairs]
    if len(row := dict(pairs)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{subject}: column {twice!r} is there twice; give each column one name")
    return row


def _csv(path: Path, name: str, delimiter: str = ",") -> Iterator[tuple[str, Any]]:
    reader = csv.reader((text for _, _, text in _lines(path, name)), delimiter=delimiter, strict=True)
    fix = f"quote fields with {_DELIMITERS[delimiter]}, quotes or line breaks"
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1  # where the row begins: quoted text may hold line breaks
        subject = f"{name} line {line} of {path}"
        limit = csv.field_size_limit(_LONGEST_CELL)  # one for all readers, so it is set back
        try:
            values = next(reader, None)
        except csv.Error as error:
            raise DataError(f"{subject}: not {path.suffix[1:].upper()} ({error}); {fix}") from None
        finally:
            csv.field_size_limit(limit)
        if values is None:
            return
        if not values:
            continue
        if header is None:
            header = [column.strip() for column in values]
            _each_once([(column, None) for column in header], subject)
            for other, them in _DELIMITERS.items():
                if len(header) == 1 and other in header[0] and other != delimiter:
                    problem = f"the columns are parted by {them} ({other!r})"
                    raise DataError(f"{subject}: {problem}; save it with commas (.csv) or tabs (.tsv)")
            continue
        if len(values) != len(header):
            raise DataError(f"{subject}: {len(values)} fields under a header of {len(header)}; {fix}")
        yield f" (line {line})", {c: _cell(c, v, subject) for c, v in zip(header, values, strict=True)}


def _cell(column: str, value: str, subject: str) -> Any:
    if re.fullmatch(r'\s+".*"\s*', value, re.DOTALL):
        problem = f"column {column!r} has a blank before its quotes, which makes them a part of the text"
        raise DataError(f"{subject}: {problem}; delete the blank")
    if column in _TEXTS:
        return _texts(value)
    if column not in _LISTS:
        return value
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        problem = f"column {column!r} is not JSON ({error.msg} at character {error.pos})"
        raise DataError(f"{subject}: {problem}; write lists as JSON, such as [[0, 5]]") from None


def _texts(value: str) -> Any:
    """Read a text as it is, "[redacted]" among them, or a JSON list of nothing but texts."""
    if not value.strip():
        return None
    try:
        texts = json.loads(value)
    except json.JSONDecodeError:
        return value
    return texts if isinstance(texts, list) and all(isinstance(text, str) for text in texts) else value


def _parquet(path: Path, name: str) -> Iterator[tuple[str, Any]]:
    try:
        from pyarrow import ArrowInvalid
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ImportError(f"{name} set: reading {path} needs pyarrow ({error}); pip install pyarrow") from error
    try:
        with ParquetFile(path) as file:
            _each_once([(column, None) for column in file.schema_arrow.names], f"{name} set: {path}")
            for batch in file.iter_batches():
                yield from (("", row) for row in batch.to_pylist())
    except FileNotFoundError:
        raise
    except (ArrowInvalid, OSError) as error:
        raise DataError(f"{name} set: {path} is not Parquet, or damaged ({error}); write it again") from None
