"""Find the sensitive spans of answers in which nobody has marked them. All are guesses: look before they are used."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from palu.data.files import DataError
from palu.data.rows import text_rows, with_spans
from palu.data.secret import marked_spans
from palu.models.lora import CausalLM

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FINDERS = "contrast, regex:PATTERN or whole"
Spans: TypeAlias = list[list[int]]


def parse(how: str) -> tuple[str, str]:
    """Read a finder's name, before anything is loaded: (contrast, regex or whole; its pattern)."""
    kind, colon, argument = how.partition(":")
    if (kind in ("contrast", "whole") and not colon) or (kind == "regex" and argument):
        if kind == "regex":
            try:
                re.compile(argument)
            except re.error as error:
                raise ValueError(f"annotate: {argument!r} is no regular expression ({error}); correct it") from None
        return kind, argument
    raise ValueError(f"annotate: {how!r} names no way to find spans; give {FINDERS}")


def annotate(
    rows: Any,
    how: str = "contrast",
    model: CausalLM | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    batch_tokens: int = 8192,
    progress: bool = True,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Find the spans of rows that have none.

    Args:
        rows: what :func:`palu.unlearn` takes for ``forget``. Rows that have ``spans`` (``[]`` counts) or are tokenised
            already, so that their labels tell, stay as they are; a ``secret`` becomes ``spans``.
        how: ``"contrast"`` finds words that carry the memory (:mod:`palu.spans.contrast`), ``"regex:PATTERN"`` every
            match of a regular expression, ``"whole"`` the whole answer. For ``contrast`` alone are the other arguments:
        model, tokenizer: the model that is to forget, which is left as it is, and its own fast tokenizer.
        batch_tokens, progress, chat_template_kwargs: as for :func:`palu.evaluate.tofu`.

    Returns copies of the rows, in their order, each of text with the column ``spans``: [start, end) in characters of
    the answer. Those that were found are in order, without blanks at their edges, and one where blanks alone part them;
    [] where none is found.

    Raises:
        ValueError: ``how`` names no finder, or its pattern is no regular expression.
        DataError: a row cannot be used, or spans were looked for and not one row has any in the end. A message names
            the row and the fix.
        TypeError: ``contrast`` without a model and a tokenizer, or with a model that palu does not support.
    """
    kind, argument = parse(how)
    if kind == "contrast" and (model is None or tokenizer is None):
        raise TypeError("annotate: contrast asks the model itself; pass model and tokenizer, or choose another finder")
    found: list[dict[str, Any]] = []
    wanted: list[tuple[str, dict[str, Any]]] = []  # (name in errors, row) each
    answers: list[str] = []
    for where, columns, answer in text_rows(rows, "forget"):
        row = with_spans(columns, answer, where)
        found.append(row)
        if answer is not None and row.get("spans") is None:
            wanted.append((where, row))
            answers.append(answer)
        elif answer is not None:
            marked_spans(row, answer, where)  # complains of what is wrong with them
    if not wanted:
        return found

    each: Sequence[Sequence[Sequence[int]]]
    if kind == "contrast":
        from palu.spans.contrast import contrast_words, sensitive_spans

        assert model is not None and tokenizer is not None
        words = contrast_words(wanted, model, tokenizer, batch_tokens, progress, chat_template_kwargs)
        each = [sensitive_spans(answer, of_answer) for answer, of_answer in zip(answers, words, strict=True)]
    elif kind == "regex":
        each = [[match.span() for match in re.finditer(argument, answer)] for answer in answers]
    else:
        each = [[(0, len(answer))] for answer in answers]
    for (_, row), answer, spans in zip(wanted, answers, each, strict=True):
        row["spans"] = merge_spans(answer, spans)
    if not any("input_ids" in row or len(row["spans"]) for row in found):
        raise DataError(f"annotate: {how} finds no span in any row; choose another finder or mark spans yourself")
    return found


def merge_spans(answer: str, spans: Sequence[Sequence[int]]) -> Spans:
    """Sort the spans, strip blanks at their edges, and merge those that overlap or are parted by blanks alone."""
    whole: Spans = []
    for start, end in sorted(map(tuple, spans)):
        piece = answer[start:end]
        start, end = end - len(piece.lstrip()), start + len(piece.rstrip())
        if start >= end:  # nothing but blanks
            continue
        if whole and not answer[whole[-1][1] : start].strip():
            whole[-1][1] = max(whole[-1][1], end)
        else:
            whole.append([start, end])
    return whole
