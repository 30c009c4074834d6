"""The column ``secret``: texts to forget, found in the answer, where nobody has counted characters for ``spans``."""

from __future__ import annotations

import unicodedata
from typing import Any

from palu.data.files import DataError
from palu.data.matching import around, merged, nearest, whole_places


def secret_spans(secret: Any, answer: str, where: str) -> list[tuple[int, int]]:
    """Find every place of a row's secrets in its answer: [start, end) in characters, in order.

    Case counts, blanks at a secret's edges do not. Where a secret begins or ends with a letter or a digit, so does a
    word or number of the answer: "25" is not in "1925". Places that overlap are one span.

    Args:
        secret: a text, or a list of texts.
        where: the row, for errors.

    Raises:
        DataError: it is something else, or a text is blank or not in the answer; the nearest one is named.
    """
    spans: list[tuple[int, int]] = []
    for wanted in secret_texts(secret, where):
        found = list(whole_places(wanted, answer))
        if not found:
            raise DataError(f"{where}: secret {wanted!r} {_why_not(wanted, answer)}")
        spans += found
    return merged(spans)


def secret_texts(secret: Any, where: str) -> list[str]:
    """Return the texts of a row's column ``secret``, without the blanks around them. Raises DataError for no text."""
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
    close = nearest(wanted, answer)
    if close is None:
        return "is not in the answer; write it as it stands there"
    if unicodedata.normalize("NFC", wanted) == unicodedata.normalize("NFC", close):
        return "is in the answer with other code points (NFC, NFD); write both in one way"
    return f"is not in the answer; did you mean {close!r}?"
