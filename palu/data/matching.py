"""Find one text in another: secrets in answers, in what a model writes, and in what a redacted report shows."""

from __future__ import annotations

import html
import json
import re
import unicodedata
from array import array
from collections.abc import Iterable, Iterator, Sequence
from difflib import SequenceMatcher
from functools import lru_cache
from itertools import chain, pairwise
from typing import NamedTuple

# Scripts that put no blank between words, or (Hangul) write particles onto them: every character may end a word there.
_UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN", "HANGUL")
_SIMILAR = 0.6  # of SequenceMatcher's ratio: difflib's own bound for a close match
_FEW = 3  # letters; fewer keep the punctuation between them ("U.S." is not "us"), and are not looked for within words
_LONG_NUMBER = re.compile(r"\d{4,}")  # shorter ones keep their punctuation: "2.5" is not 25
_GROUPED_NUMBER = re.compile(r"(?<!\d)\d{1,3}(?:[,.'\u2019]\d{2,3})*[,.'\u2019]\d{3}(?!\d)")
_ESCAPE = re.compile(r'&#?\w{1,31};|\\u(?i:d[89ab]..\\ud[c-f]..|[\da-f]{4})|\\["\\/bfnrt]')
_CHARACTER = re.compile(".", re.DOTALL)
_ESCAPE_OR_CHARACTER = re.compile(rf"{_ESCAPE.pattern}|.", re.DOTALL)

Span = tuple[int, int]  # [start, end) in characters


def stands_in(secret: str, text: str) -> bool:
    """Whether a text holds a secret as whole words, case and punctuation aside (:func:`find`)."""
    return next(find(secret, text, whole=True), None) is not None


def find(secret: str, text: str, *, whole: bool) -> Iterator[Span]:
    """Yield the places where a text has the words of a secret, case and punctuation aside; HTML and JSON unescaped.

    Within a word ("O'Neil") or a number ("7,391") one mark of punctuation may be missing or come in addition. Accents
    and vowel signs are of the word. A secret without letter or digit (an emoji) is looked for as it is.

    whole: as whole words and numbers; else within longer ones, too, and with the punctuation that the secret has.
    """
    wanted = _secret_readings(secret.strip())[0]
    for read in _text_readings(text) if wanted.text else ():
        for i, end in _places(wanted.letters, read.letters) if wanted.letters else ():
            place = read.indices[i], read.indices[end - 1] + 1
            within = not whole and len(wanted.letters) >= _FEW
            if _is_parted_alike(wanted, read, i) and (within or _is_whole(read, place)):
                yield read.span(place)
        for place in _places(wanted.text, read.text):  # as it is written, punctuation around it included
            if not whole or not wanted.letters or _is_whole(read, place):
                yield read.span(place)


def letters(text: str) -> list[str]:
    """Return a text's letters, digits and marks without case; where it has escapes, also of what they stand for.

    :func:`find` finds a secret only where the first of its own are in one of the text's.
    """
    return [read.letters for read in _text_readings(text)]


def merged(spans: Iterable[Span]) -> list[Span]:
    """Sort spans, and join those that overlap."""
    found: list[Span] = []
    for start, end in sorted(spans):
        if found and start < found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((start, end))
    return found


def split_at(text: str, spans: Iterable[Span]) -> list[tuple[str, bool]]:
    """Split a text at spans, which may overlap and reach beyond it: (part, whether a span holds it)."""
    within = ((max(start, 0), min(end, len(text))) for start, end in spans)
    edges = [0, *chain.from_iterable(merged(span for span in within if span[0] < span[1])), len(text)]
    return [(text[start:end], i % 2 == 1) for i, (start, end) in enumerate(pairwise(edges)) if start < end]


class _Reading(NamedTuple):
    """A text without case, accents apart from their letters.

    starts, ends: of each of its characters, the span of the original one with its accents.
    letters: letters, digits and marks alone. indices: their places in the text.
    """

    text: str
    starts: Sequence[int]
    ends: Sequence[int]
    letters: str
    indices: Sequence[int]

    def span(self, place: Span) -> Span:
        """Return a place's span in the original text."""
        return self.starts[place[0]], self.ends[place[1] - 1]

    def gap(self, i: int) -> str:
        """Return what stands between a letter and the one before it; joiners and soft hyphens part no words."""
        between = self.text[self.indices[i - 1] + 1 : self.indices[i]]
        return "".join(character for character in between if unicodedata.category(character) != "Cf")


def _readings(text: str) -> list[_Reading]:
    """Read a text as it is; where it has escapes, also as what they stand for."""
    return [_read(text, pattern) for pattern in (_CHARACTER, _ESCAPE_OR_CHARACTER)[: 1 + bool(_ESCAPE.search(text))]]


# Each secret is looked for in text after text, and each text is searched for one secret after another.
_secret_readings, _text_readings = lru_cache(maxsize=2**14)(_readings), lru_cache(maxsize=256)(_readings)


def _read(text: str, pattern: re.Pattern[str]) -> _Reading:
    pieces: list[tuple[int, int, str]] = []  # characters with their accents
    for match in pattern.finditer(text):
        start, written = match.start(), _unescaped(match[0])
        if pieces and _is_mark(written[0]):
            start, _, before = pieces.pop()
            written = before + written
        pieces.append((start, match.end(), written))
    characters: list[str] = []
    starts, ends, indices = array("q"), array("q"), array("q")
    after_letter = False
    for start, end, written in pieces:
        for character in _decomposed(_decomposed(written).casefold()):
            after_letter = character.isalnum() or (_is_mark(character) and after_letter)
            if after_letter:
                indices.append(len(characters))
            characters.append(character)
            starts.append(start)
            ends.append(end)
    return _Reading("".join(characters), starts, ends, "".join(characters[i] for i in indices), indices)


def _unescaped(written: str) -> str:
    if len(written) == 1:
        return written
    plain = html.unescape(written) if written[0] == "&" else str(json.loads(f'"{written}"'))
    return plain or written


def _decomposed(text: str) -> str:
    return unicodedata.normalize("NFKD", text)


def _is_parted_alike(wanted: _Reading, read: _Reading, first: int) -> bool:
    """Whether the letters from the first one on stand apart where the wanted ones do, as far as it counts."""
    for i in range(1, len(wanted.letters)):
        own, gap = wanted.gap(i), read.gap(first + i)
        if bool(own) == bool(gap):
            continue
        of_number = wanted.letters[i - 1 : i + 1].isdecimal()
        if of_number:
            long = any(number.start() < i < number.end() for number in _LONG_NUMBER.finditer(wanted.letters))
        else:
            long = len(wanted.letters) >= _FEW
        if not long or len(gap) > 1 or (gap.isspace() and not of_number):
            return False
    return True


def _is_whole(read: _Reading, place: Span) -> bool:
    """Whether a place neither begins nor ends within a word, a number or an accented letter."""
    return not any(
        _in_word(read.text, edge) or (0 < edge < len(read.text) and read.starts[edge - 1] == read.starts[edge])
        for edge in place
    )


def whole_places(wanted: str, text: str) -> Iterator[tuple[int, int]]:
    """Yield each place [start, end) in a text where a wanted one stands, and not within a longer word or number."""
    for start, end in _places(wanted, text):
        if not (_in_word(text, start) or _in_word(text, end)):
            yield start, end


def words_of(run: str) -> list[str]:
    """Return a run of letters as one word, or letter by letter where its script puts no blanks between words."""
    return [run] if all(map(_is_spaced, run)) else list(run)


def around(wanted: str, text: str) -> str | None:
    """Return the longer words of a text that the wanted one is part of, at its first place; None: it has none."""
    return next((_widened(text, start, end) for start, end in _places(wanted, text)), None)


def nearest(wanted: str, text: str) -> str | None:
    """Return the whole words of a text that are most like the wanted ones, case aside; None: none are.

    They are looked for around what the two have in common.
    """
    common = SequenceMatcher(None, _caseless(text), _caseless(wanted), autojunk=False).find_longest_match()
    start = max(common.a - common.b, 0)
    words = _widened(text, start, min(start + len(wanted), len(text))).strip()
    alike = SequenceMatcher(None, _folded(words), _folded(wanted), autojunk=False).ratio() >= _SIMILAR
    return words if alike else None


def _widened(text: str, start: int, end: int) -> str:
    """Return a part of a text, with the rest of the words and numbers at its edges."""
    while _in_word(text, start):
        start -= 1
    while _in_word(text, end):
        end += 1
    return text[start:end]


def _places(wanted: str, text: str) -> Iterator[tuple[int, int]]:
    start = text.find(wanted)
    while start >= 0:
        yield start, start + len(wanted)
        start = text.find(wanted, start + 1)


def _in_word(text: str, i: int) -> bool:
    """Whether text[i - 1] and text[i] are of one word or number, the marks that group its digits among them."""
    if not 0 < i < len(text):
        return False
    both = text[i - 1 : i + 1]
    if all(map(_is_spaced, both)):
        return True
    of_number = any(map(str.isdecimal, both)) and not any(map(str.isspace, both))
    return of_number and any(one.start() < i < one.end() for one in _GROUPED_NUMBER.finditer(text))


def _is_spaced(character: str) -> bool:
    """Whether this is a letter, its accent, or a digit, of a script with blanks between words."""
    if character.isascii():
        return character.isalnum()
    of_word = character.isalnum() or _is_mark(character)
    return of_word and not unicodedata.name(character, "").startswith(_UNSPACED)


def _is_mark(character: str) -> bool:
    return unicodedata.category(character).startswith("M")


def _caseless(text: str) -> str:
    """Return a text without case, its characters at their places (of an "ß" casefold makes two)."""
    return "".join(one if len(one.casefold()) > 1 else one.casefold() for one in text)


def _folded(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold()
