"""Read rows from a file: JSONL, CSV or Parquet, by its suffix.

==================== ====================================================================================
suffix               rows
==================== ====================================================================================
``.csv``             one a line under a header, separated by commas, UTF-8; lists (``spans``, ``messages``,
                     ``input_ids``, ``labels``, ``attention_mask``) are JSON text, an empty one is missing;
                     ``secret`` is a text as it is, or a JSON list of texts, or missing if empty
``.parquet``         one a record; lists are lists (needs ``pyarrow``)
any other            JSONL: one JSON object a line, UTF-8; blank lines are no rows
==================== ====================================================================================
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_DELIMITERS = {";": "semicolons", "\t": "tabs", "|": "bars"}  # by which a file may be parted that calls itself CSV
_LONGEST_CELL = 2**31 - 1  # characters, the most that every platform takes; the module's own limit is 131,072
_LISTS = ("spans", "messages", "input_ids", "labels", "attention_mask")


class DataError(ValueError):
    """The user's data cannot be used. The message names set, row, column or span, and the mend."""


def read_rows(path: Path, name: str) -> Iterator[tuple[str, Any]]:
    """Yield (where it is, such as " (line 3)", the row) for each row of a file.

    name: the set's, for errors.

    Raises DataError, naming file and line, where the file is not what its suffix says; FileNotFoundError and other
    OSErrors; ImportError where Parquet wants a package.
    """
    reader = {".csv": _csv, ".parquet": _parquet}.get(path.suffix.lower(), _jsonl)
    return reader(path, name)


def _lines(path: Path, name: str) -> Iterator[tuple[str, str, str]]:
    """Yield (where it is, the same for errors, text) for each line."""
    # Read as bytes: a line ends at "\n" alone, and bad UTF-8 is told with its line number.
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            told = f"{name} line {number} of {path}"
            try:
                yield f" (line {number})", told, line.decode("utf-8-sig")
            except UnicodeDecodeError:
                raise DataError(f"{told}: not UTF-8; save the file as UTF-8") from None


def _jsonl(path: Path, name: str) -> Iterator[tuple[str, Any]]:
    begun = False
    for where, told, text in _lines(path, name):
        if text.strip():
            if not begun and text.lstrip().startswith("["):
                mend = f"write one JSON object per line (JSONL), as this does: jq -c '.[]' {path} > rows.jsonl"
                raise DataError(f"{told}: a JSON list begins here; {mend}")
            begun = True
            try:
                yield where, json.loads(text.strip())
            except json.JSONDecodeError as error:
                problem = f"not JSON ({error.msg} at column {error.colno})"
                raise DataError(f"{told}: {problem}; write one JSON object per line") from None


def _csv(path: Path, name: str) -> Iterator[tuple[str, Any]]:
    reader = csv.reader((text for _, _, text in _lines(path, name)), strict=True)
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1  # where the row begins: quoted text may hold line breaks
        told = f"{name} line {line} of {path}"
        limit = csv.field_size_limit(_LONGEST_CELL)  # one for all readers, so it is set back
        try:
            values = next(reader, None)
        except csv.Error as error:
            raise DataError(f"{told}: not CSV ({error}); quote fields with commas, quotes or line breaks") from None
        finally:
            csv.field_size_limit(limit)
        if values is None:
            return
        if not values:
            continue
        if header is None:
            header = values
            if len(set(header)) < len(header):
                twice = next(column for column in header if header.count(column) > 1)
                raise DataError(f"{told}: column {twice!r} is there twice; give each column one name")
            for delimiter, them in _DELIMITERS.items():
                if len(header) == 1 and delimiter in header[0]:
                    raise DataError(f"{told}: the columns are parted by {them} ({delimiter!r}); save it with commas")
            continue
        if len(values) != len(header):
            problem = f"{len(values)} fields under a header of {len(header)}"
            raise DataError(f"{told}: {problem}; quote fields with commas, quotes or line breaks")
        yield f" (line {line})", {c: _cell(c, v, told) for c, v in zip(header, values, strict=True)}


def _cell(column: str, value: str, told: str) -> Any:
    if column == "secret":
        return _texts(value)
    if column not in _LISTS:
        return value
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        problem = f"column {column!r} is not JSON ({error.msg} at character {error.pos})"
        raise DataError(f"{told}: {problem}; write lists as JSON, such as [[0, 5]]") from None


def _texts(value: str) -> Any:
    """Read a secret, "[redacted]" among them; a list is one only if it holds nothing but texts."""
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
            for batch in file.iter_batches():
                yield from (("", row) for row in batch.to_pylist())
    except (ArrowInvalid, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise DataError(f"{name} set: {path} is not Parquet, or damaged ({error}); write it again") from None
