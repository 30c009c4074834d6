"""What a row marks in its answer: by texts (column ``secret``) or by characters (column ``spans``)."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from numbers import Integral
from typing import Any

from palu.data.files import DataError
from palu.data.matching import around, merged, nearest, whole_places
from palu.settings import is_int


def marked_spans(columns: Mapping[str, Any], answer: str, where: str) -> list[tuple[int, int]]:
    """Return what the row's ``secret`` or ``spans`` mark in its answer: [start, end) in characters, in order.

    A secret is marked at every place. Case counts, blanks at its edges do not. Where it begins or ends with a letter
    or a digit, so does a word or number of the answer: "25" is not in "1925". Places that overlap are one span.

    Raises DataError where a column is not what it should be, or a secret is not in the answer; the nearest is named.
    """
    secret = columns.get("secret")
    if secret is None:
        return _spans(columns, answer, where)
    if columns.get("spans") is not None:
        raise DataError(f"{where}: it has 'secret', and also 'spans'; leave one of them out")
    spans: list[tuple[int, int]] = []
    for wanted in _secret_texts(secret, where):
        found = list(whole_places(wanted, answer))
        if not found:
            raise DataError(f"{where}: secret {wanted!r} {_why_not(wanted, answer)}")
        spans += found
    return merged(spans)


def marked_texts(columns: Mapping[str, Any], answer: str, where: str) -> list[str]:
    """Return the texts of :func:`marked_spans`, and secrets that are in one span with others."""
    secret = columns.get("secret")
    texts = [answer[start:end] for start, end in marked_spans(columns, answer, where)]
    return list(dict.fromkeys([*texts, *([] if secret is None else _secret_texts(secret, where))]))


def _secret_texts(secret: Any, where: str) -> list[str]:
    """Return the texts of a row's column ``secret``, without the blanks around them."""
    value = secret.tolist() if hasattr(secret, "tolist") else secret
    texts = value if isinstance(value, list | tuple) else [value]
    for text in texts:
        if not isinstance(text, str):
            got = type(text).__name__
            raise DataError(f"{where}: column 'secret' must be text or a list of texts, got {got}; put it in quotes")
        if not text.strip():
            raise DataError(f"{where}: column 'secret' is blank; give the text to forget, or [] for nothing")
    return [text.strip() for text in texts]


def _why_not(wanted: str, answer: str) -> str:
    """Say why a secret was not found, and the fix."""
    if (longer := around(wanted, answer)) is not None:
        return f"is in the answer only as a part of {longer!r}; give all of it, or use 'spans'"
    if unicodedata.normalize("NFC", wanted) in unicodedata.normalize("NFC", answer):
        return "is in the answer with other code points (NFC, NFD); write both in one way"
    if (close := nearest(wanted, answer)) is not None:
        return f"is not in the answer; did you mean {close!r}?"
    return "is not in the answer; write it as it stands there"


def _spans(columns: Mapping[str, Any], answer: str, where: str) -> list[tuple[int, int]]:
    """Check the row's spans, sort them, and strip the blanks at their edges."""
    spans = columns.get("spans")
    if spans is None:
        fix = "give the text to forget, or [] if nothing is sensitive"
        raise DataError(f"{where}: column 'secret' (or 'spans') is missing; {fix}")
    fix = "give [start, end) in characters of the answer"
    spans = spans.tolist() if hasattr(spans, "tolist") else spans
    if not isinstance(spans, list | tuple):
        got = type(spans).__name__
        raise DataError(f"{where}: column 'spans' must be a list of pairs, got {got}; {fix}")
    if len(spans) == 2 and all(isinstance(edge, Integral) for edge in spans):
        pair = [int(edge) for edge in spans]
        raise DataError(f"{where}: column 'spans' is one pair, not a list of pairs; write [{pair}]")
    checked: list[tuple[int, int]] = []
    for span in spans:
        pair = span.tolist() if hasattr(span, "tolist") else span
        if not (isinstance(pair, list | tuple) and len(pair) == 2 and all(map(is_int, pair))):
            raise DataError(f"{where}: span {pair!r} is not two integers; {fix}")
        start, end = int(pair[0]), int(pair[1])
        subject = f"{where}: span [{start}, {end}]"
        if start >= end:
            raise DataError(f"{subject} is empty or reversed; {fix}")
        if start < 0:
            raise DataError(f"{subject} starts before the answer; {fix}")
        if end > len(answer):
            raise DataError(f"{subject} ends after the answer ({len(answer)} characters); {fix}")
        if not answer[start:end].strip():
            raise DataError(f"{subject} holds only whitespace; move it onto the words or remove it")
        checked.append((start, end))
    # A span within another repeats it (TOFU's annotations do) and changes no role. Two that cross are
    # a slip in somebody's arithmetic.
    checked.sort(key=lambda span: (span[0], -span[1]))
    outer = (0, 0)
    for span in checked:
        if span[0] < outer[1] < span[1]:
            raise DataError(f"{where}: spans {list(outer)} and {list(span)} overlap; merge or part them")
        outer = max(outer, span, key=lambda one: one[1])
    return [(end - len(answer[start:end].lstrip()), start + len(answer[start:end].rstrip())) for start, end in checked]
