"""Blot the secrets out of the texts that a report shows."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

from palu.data.matching import Span, find, letters, split_at
from palu.report.reading import Json

MASK = "███"


class Redaction:
    """Blots secrets out of texts, wherever :func:`palu.data.matching.find` finds one; without secrets it does nothing.

    Args:
        secrets: the marked texts, each for itself.
    """

    def __init__(self, secrets: Iterable[str]):
        self.secrets = [(letters(secret)[0], secret) for secret in sorted(set(secrets))]
        self.spans = cache(self._spans)

    def __call__(self, value: Any) -> Any:
        """Redact a text, or every text in a value of JSON."""
        if isinstance(value, str):
            return blot(value, self.spans(value))
        if isinstance(value, list):
            return [self(one) for one in value]
        return {self(name): self(one) for name, one in value.items()} if isinstance(value, dict) else value

    def _spans(self, text: str) -> list[Span]:
        there = " ".join(letters(text))  # looked at first, for speed
        return [span for own, secret in self.secrets if own in there for span in find(secret, text, whole=False)]


def blot(text: str, spans: Iterable[Span]) -> str:
    """Put a mask in place of each span."""
    return "".join(MASK if held else part for part, held in split_at(text, spans))


def texts_to_hide(record: Json, audit: Json | None, asked: Json | None) -> set[str]:
    """Collect what is marked in the sets of a run, its audit and its evaluation."""
    hidden = set(record["marked"])
    if audit:
        hidden |= {*audit["marked"], *(secret["text"] for secret in audit["secrets"])}
    return hidden | set(asked["marked"] if asked else ())
