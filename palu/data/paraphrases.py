"""The column ``paraphrased_question``: a row's question in other words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from palu.data.files import DataError
from palu.data.rows import iterate_rows, with_question

PARAPHRASES = "paraphrased_question"  # a question in other words, or a list of them


def paraphrases_of(columns: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """Read a row's paraphrases of its question."""
    value: Any = columns.get(PARAPHRASES)
    value = value.tolist() if hasattr(value, "tolist") else value
    texts = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) and text.strip() for text in texts):
        raise DataError(
            f"{where}: column '{PARAPHRASES}' must be a question, or a list of them; correct it or leave it out"
        )
    return tuple(texts)


def paraphrased_rows(source: Any, name: str) -> Iterator[tuple[int, str, Mapping[str, Any]]]:
    """Yield (row number, its name in errors, the row with another question) for each paraphrase of a set of texts."""
    for row, where, columns in iterate_rows(source, name):
        for text in paraphrases_of(columns, where):
            yield row, where, with_question(columns, text)
