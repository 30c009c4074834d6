"""Find one text in another as whole words: secrets in answers, and in what a model writes."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterator

_WORD = re.compile(r"[^\W_]+")
# Scripts that put no blank between words, or (Hangul) write particles onto them: every character may end a word there.
_UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN", "HANGUL")
_SIMILAR = 0.6  # difflib's own bound for a close match


def told(secret: str, text: str) -> bool:
    """Whether a text holds a secret as whole words, case and punctuation aside.

    A secret without any letter or digit (an emoji) is looked for as it is.
    """
    words = _plain(secret)
    if not words:
        return secret.strip() in text
    return next(whole_places(words, _plain(text)), None) is not None


def whole_places(wanted: str, text: str) -> Iterator[tuple[int, int]]:
    """Yield each place [start, end) in a text where a wanted one stands, and not within a longer word or number."""
    for start, end in _places(wanted, text):
        if not (_in_word(text, start) or _in_word(text, end)):
            yield start, end


def around(wanted: str, text: str) -> str | None:
    """Return the longer words of a text that the wanted one is part of, at its first place; None: it has none."""
    for start, end in _places(wanted, text):
        while _in_word(text, start):
            start -= 1
        while _in_word(text, end):
            end += 1
        return text[start:end]
    return None


def nearest(wanted: str, text: str) -> str | None:
    """Return the whole words of a text that are most like the wanted ones, case aside; None: none are."""
    shortest, longest = len(wanted) // 2, 3 * len(wanted) // 2 + 1
    starts = [i for i, character in enumerate(text) if not character.isspace() and not _in_word(text, i)]
    ends = [i + 1 for i, character in enumerate(text) if not character.isspace() and not _in_word(text, i + 1)]
    parts: dict[str, str] = {}
    first = 0
    for start in starts:
        while first < len(ends) and ends[first] - start < max(shortest, 1):
            first += 1
        for end in ends[first:]:
            if end - start > longest:
                break
            parts.setdefault(_folded(text[start:end]), text[start:end])
    close = difflib.get_close_matches(_folded(wanted), parts, n=1, cutoff=_SIMILAR)
    return parts[close[0]] if close else None


def _places(wanted: str, text: str) -> Iterator[tuple[int, int]]:
    start = text.find(wanted)
    while start >= 0:
        yield start, start + len(wanted)
        start = text.find(wanted, start + 1)


def _in_word(text: str, i: int) -> bool:
    """Whether text[i - 1] and text[i] are of one word or number."""
    return 0 < i < len(text) and all(_is_spaced(character) for character in text[i - 1 : i + 1])


def _is_spaced(character: str) -> bool:
    """Whether this is a letter, its accent, or a digit, of a script with blanks between words."""
    if character.isascii():
        return character.isalnum()
    of_word = character.isalnum() or unicodedata.category(character).startswith("M")
    return of_word and not unicodedata.name(character, "").startswith(_UNSPACED)


def _plain(text: str) -> str:
    return " ".join(_WORD.findall(_folded(text)))


def _folded(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold()
