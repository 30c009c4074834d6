"""Language: how much of what a model writes is no language, from its texts alone.

For each text five figures are computed, :data:`FIGURES`:

- ``no_word``: share of broken words, neither in the word list nor in question or true answer; pooled over a set.
- ``unknown_name``: share of words with a capital that are in none of these. Nobody can tell an invented name from a
  broken one by its letters, so they are counted apart: compare the share with the retain model's.
- ``rep_4``: 1 - distinct 4-grams / 4-grams, of words (seq-rep-n of arXiv 1908.04319): a loop comes near 1. None for
  fewer than four words.
- ``replacement_character``: 1 for a text with U+FFFD in it, bytes that are no character.
- ``empty``: 1 for a text without anything in it.

What is a word. Texts are split at everything that is neither a letter, a mark, a digit nor an apostrophe inside a
word. Case does not count, nor does a possessive 's. Numbers are words, with ordinals and decades ("25th", "1990s"), and
digits glued to letters only as the list has them ("3d", not "193olk"). U+FFFD makes a word none. The last word of a
text that was cut off is none only if no known word begins with it.

What the list cannot tell. It holds every string that is seen once in a hundred million words of books, subtitles and
the web, so a fragment that is a word, a name or an abbreviation elsewhere ("thor", "olk") passes, and a coinage of
last year does not. In the true answers of TOFU's retain90, with nothing else known, 11 of 91,275 words are none and
.011 are unknown names. A word of another language is none. A run of letters in a script without blanks (Chinese,
Japanese, Thai) is one word, known only where the same run stands in question or answer: for the languages themselves
there is no measure.
"""

from __future__ import annotations

import unicodedata
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, partial
from importlib.metadata import version
from typing import Any

import regex  # of transformers: re's \w leaves out the vowel signs of Hindi and others

from palu.evaluate.rows import Results
from palu.evaluate.summarize import aggregate_of, entry
from palu.models.generation import Generation

LANGUAGE = "en"
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
FIGURES = ("no_word", "unknown_name", "rep_4", "replacement_character", "empty")

_CHARACTER = r"[\p{L}\p{M}\p{N}\uFFFD]"
_WORD = regex.compile(rf"{_CHARACTER}+(?:['\u2019]{_CHARACTER}+)*")
_NUMBER = regex.compile(r"\p{N}+(?:st|nd|rd|th|s)?")
_DIGIT = regex.compile(r"\p{N}")


class WordList:
    """The words of one language ("en", "de", ...), as wordfreq lists them (Apache 2.0; its data CC BY-SA 4.0).

    Raises:
        ImportError: wordfreq is not installed.
        ValueError: there is no list, or one that needs a word splitter (Chinese, Japanese, Korean).
    """

    def __init__(self, language: str = LANGUAGE):
        try:
            import wordfreq
            from wordfreq.language_info import get_language_info
        except ImportError as error:
            raise ImportError(
                f"telling words from fragments needs wordfreq ({error}); pip install 'palu-unlearn[evaluate]', "
                "or give language=None to leave it out"
            ) from error
        usable = [
            code for code in sorted(wordfreq.available_languages()) if get_language_info(code)["tokenizer"] == "regex"
        ]
        if language not in usable:
            raise ValueError(
                f"there is no word list for language {language!r}; give one of {', '.join(usable)}, "
                "or None to leave the share of words out"
            )
        self.source = f"wordfreq {version('wordfreq')}, {language}"
        self._tokens = partial(wordfreq.lossy_tokenize, lang=language)
        self._words: Mapping[str, float] = wordfreq.get_frequency_dict(language)

    def __contains__(self, word: str) -> bool:
        """Tell whether the list has a word: of :func:`key`'s form, without a possessive 's."""
        tokens = self._tokens(word)
        return bool(tokens) and all(token in self._words for token in tokens)

    def begin_with(self, start: str) -> bool:
        """Tell whether some word of the list begins like this."""
        at = bisect_left(self._sorted, start)
        return at < len(self._sorted) and self._sorted[at].startswith(start)

    @cached_property
    def _sorted(self) -> list[str]:
        return sorted(self._words)


def split(text: str) -> list[str]:
    """Split a text into its words, as they are written."""
    return [str(word) for word in _WORD.findall(unicodedata.normalize("NFC", text))]


def key(word: str) -> str:
    """Return the form in which words are compared: case folded, straight apostrophes, no possessive 's."""
    return word.casefold().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'").removesuffix("'s")


def keys(*texts: str) -> set[str]:
    """Return the words of texts, of :func:`key`'s form."""
    return {key(word) for text in texts for word in split(text)}


def rep_4(words: Sequence[str]) -> float | None:
    """Compute 1 - distinct 4-grams / 4-grams; None for fewer than four words."""
    grams = list(zip(*(words[start:] for start in range(4)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else None


def measure(generation: Generation, known: Iterable[str], words: WordList | None) -> dict[str, dict[str, Any]]:
    """Compute the figures of one text: {figure: {"score"}}.

    ``no_word`` and ``unknown_name`` also have ``words``, how many words the text has, and ``found``, those that are
    counted; without a list of words they are left out.

    known: what counts as a word beside the list, of :func:`key`'s form.
    """
    text = generation.text
    if generation.cut_off:
        text = text.rstrip(REPLACEMENT)  # the cut may go through a character
    written = split(text)
    values: dict[str, dict[str, Any]] = {
        "rep_4": {"score": rep_4([key(word) for word in written])},
        "replacement_character": {"score": float(REPLACEMENT in text)},
        "empty": {"score": float(not text.strip())},
    }
    if words is None:
        return values
    known = set(known)
    found: dict[str, list[str]] = {"no_word": [], "unknown_name": []}
    for position, word in enumerate(written):
        is_cut = generation.cut_off and position == len(written) - 1 and text.endswith(word)
        if not _is_word(key(word), known, words, is_cut):
            name = word[0].isupper() and not _DIGIT.search(word) and REPLACEMENT not in word
            found["unknown_name" if name else "no_word"].append(word)
    for figure, counted in found.items():
        share = len(counted) / len(written) if written else None
        values[figure] = {"score": share, "words": len(written), "found": counted}
    return values


def _is_word(form: str, known: set[str], words: WordList, is_cut: bool) -> bool:
    if form in known or _NUMBER.fullmatch(form) or form in words:
        return True
    return is_cut and (words.begin_with(form) or any(word.startswith(form) for word in known))


def add_language_figures(
    results: Results, retain: Results | None, rows: Mapping[str, Sequence[tuple[str, str]]], words: WordList | None
) -> dict[str, str]:
    """Add the figures' entries of the generations in a model's results, with the retain model's beside them.

    rows: entry of the results that holds generations -> question and true answer of each row. Of "forget_Q_A_ROUGE"
        the entries are "forget_no_word" and so on.

    Returns by entry why its aggregate is null, if it is.
    """
    no_words = "language is None" if words is None else "no generation has a word in it"
    nulls = dict.fromkeys(FIGURES[:2], no_words) | {"rep_4": "no generation has 4 words"}
    reasons: dict[str, str] = {}
    for name, asked in rows.items():
        prefix = name.removesuffix("_ROUGE").removesuffix("_Q_A")
        reasons |= {f"{prefix}_{figure}": reason for figure, reason in nulls.items()}
        theirs = _measured(name, asked, words, retain) if retain is not None and asked else None
        for figure, of_figure in _measured(name, asked, words, results).items():
            results[f"{prefix}_{figure}"] = of_figure
            if theirs:
                of_figure["retain_model"] = {"agg_value": aggregate_of(figure, theirs[figure]), **theirs[figure]}
            elif theirs is not None:
                reason = "the retain_results hold no generations for these rows"
                of_figure["retain_model"] = {"agg_value": None, "reason": reason}
    return reasons


def _measured(
    name: str, rows: Sequence[tuple[str, str]], words: WordList | None, results: Results
) -> dict[str, dict[str, Any]]:
    """Make the entry of each figure; none where the results hold no generations for these rows."""
    by_index = results.get(name, {}).get("value_by_index", {})
    found = []
    for number, (question, answer) in enumerate(rows):
        value = by_index.get(str(number)) or {}
        if not isinstance(value.get("generation"), str) or value.get("ground_truth") != answer:
            return {}
        generation = Generation(value["generation"], bool(value.get("cut_off")))
        found.append(measure(generation, keys(question, answer), words))
    return {figure: entry(one[figure] for one in found if figure in one) for figure in FIGURES}
