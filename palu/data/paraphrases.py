"""Columns of further questions: ``paraphrased_question``, and ``also_asked``, which only the audit asks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from palu.data.files import DataError
from palu.data.rows import iterate_rows, with_question

PARAPHRASES = "paraphrased_question"  # a question in other words, or a list of them
ALSO_ASKED = "also_asked"  # another question that the secret answers (by an alias, through another fact), or a list


def questions_of(columns: Mapping[str, Any], column: str, where: str) -> tuple[str, ...]:
    """Read the questions in one of a row's columns."""
    value: Any = columns.get(column)
    value = value.tolist() if hasattr(value, "tolist") else value
    texts = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) and text.strip() for text in texts):
        raise DataError(f"{where}: column '{column}' must be a question, or a list of them; correct it or leave it out")
    return tuple(texts)


def paraphrased_rows(source: Any, name: str) -> Iterator[tuple[int, str, Mapping[str, Any]]]:
    """Yield (row number, its name in errors, the row with another question) for each paraphrase of a set of texts."""
    for row, where, columns in iterate_rows(source, name):
        for text in questions_of(columns, PARAPHRASES, where):
            yield row, where, with_question(columns, text)
