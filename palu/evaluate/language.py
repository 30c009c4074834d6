"""Language: how much of what a model writes is no language, from its texts alone.

For each text five figures are computed, :data:`FIGURES`:

``no_word``
    Share of broken words: neither in the word list, nor in the question, nor in the true answer. Pooled over the words
    of a set.
``unknown_name``
    Share of words that begin with a capital and are found in none of these. Nobody can tell an invented name from a
    broken one by its letters, so they are counted apart: compare the share with the retain model's.
``rep_4``
    1 - distinct 4-grams / 4-grams, of words (seq-rep-n of arXiv 1908.04319): a loop comes near 1. None for a text of
    fewer than four words.
``replacement_character``
    1 for a text with U+FFFD in it: bytes that are no character.
``empty``
    1 for a text without anything in it.

What is a word. Texts are split at everything that is neither a letter, a mark, a digit nor an apostrophe inside a
word; so the parts of "sci-fi" are two words. Case does not count, nor does a possessive 's. A number is a word. Digits
glued to letters are none ("193olk"), but ordinals and decades are ("25th", "1990s"), and what the list holds with a
single digit ("3d", "b2b"). U+FFFD makes a word none. The last word of a text that was cut off at its greatest length is
none only if no known word begins with it.

What the list cannot tell. It holds every string that is seen once in a hundred million words of books, subtitles and
the web, so a fragment that is a word, a name or an abbreviation elsewhere ("thor", "olk") passes, and a coinage of
last year does not. In the true answers of TOFU's retain90, with nothing else known, 11 of 91,275 words are none
(misspellings such as "capitivate", coinages such as "mythspaced", Ukrainian) and .011 are unknown names. A word of
another language is none, unless the list has it or question or answer do. A run of letters in a script without
blanks (Chinese, Japanese, Thai) is one word, known only where the same run stands in question or answer: for the
languages themselves there is no measure, since any of their characters alone is a word.
"""

from __future__ import annotations

import unicodedata
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, partial
from importlib.metadata import version
from typing import Any

import regex  # of transformers: re's \w leaves out the vowel signs of Hindi and others

from palu.evaluate.rows import Results
from palu.evaluate.summarize import aggregate_of, entry
from palu.models.generation import Generation

LANGUAGE = "en"
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
FIGURES = ("no_word", "unknown_name", "rep_4", "replacement_character", "empty")
NO_GENERATIONS = "the retain_results hold no generations for these rows"

_N = 4
_CHARACTER = r"[\p{L}\p{M}\p{N}\uFFFD]"
_WORD = regex.compile(rf"{_CHARACTER}+(?:['\u2019]{_CHARACTER}+)*")
_NUMBER = regex.compile(r"\p{N}+(?:st|nd|rd|th|s)?")
_DIGIT = regex.compile(r"\p{N}")


class WordList:
    """The words of one language, as wordfreq lists them (Apache 2.0; its data CC BY-SA 4.0).

    Args:
        language: its code: "en", "de", ...

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
        self.language = language
        self.source = f"wordfreq {version('wordfreq')}, {language}"
        self._tokens = partial(wordfreq.lossy_tokenize, lang=language)
        self._words: Mapping[str, float] = wordfreq.get_frequency_dict(language)

    def __contains__(self, word: str) -> bool:
        """Tell whether the list has a word: of :func:`key`'s form, without a possessive 's."""
        tokens = self._tokens(word)
        return bool(tokens) and all(token in self._words for token in tokens)

    def begin_with(self, start: str) -> bool:
        """Tell whether some word of the list begins like this."""
        words = _sorted_words(self.language)
        at = bisect_left(words, start)
        return at < len(words) and words[at].startswith(start)


@cache
def _sorted_words(language: str) -> list[str]:
    """Sort the words of a list, once for all evaluations of a process."""
    from wordfreq import get_frequency_dict

    return sorted(get_frequency_dict(language))


def split(text: str) -> list[str]:
    """Split a text into its words, as they are written."""
    return [str(word) for word in _WORD.findall(unicodedata.normalize("NFC", text))]


def key(word: str) -> str:
    """Return the form in which words are compared: case folded, straight apostrophes, no possessive 's."""
    return word.casefold().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'").removesuffix("'s")


def rep_n(words: Sequence[str], n: int = _N) -> float | None:
    """Compute 1 - distinct n-grams / n-grams; None for fewer than n words."""
    ngrams = list(zip(*(words[start:] for start in range(n)), strict=False))
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else None


def measure(generation: Generation, known: Iterable[str], words: WordList | None) -> dict[str, dict[str, Any]]:
    """Compute the figures of one text: {figure: {"score"}}.

    ``no_word`` and ``unknown_name`` also have ``words``, how many words the text has, and ``found``, those that are
    counted.

    Args:
        known: what counts as a word beside the list, of :func:`key`'s form.
        words: the list; None: ``no_word`` and ``unknown_name`` are left out.
    """
    text = generation.text
    if generation.cut_off:
        text = text.rstrip(REPLACEMENT)  # the cut may go through a character
    written = split(text)
    values: dict[str, dict[str, Any]] = {
        "rep_4": {"score": rep_n([key(word) for word in written])},
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


class LanguageFigures:
    """Make the figures' entries of the generations in a model's results, with the retain model's beside them.

    Args:
        words: the list; None: the shares of words are left out.
        rows: entry of the results that holds generations -> question and true answer of each row.
    """

    def __init__(self, words: WordList | None, rows: Mapping[str, Sequence[tuple[str, str]]]):
        self.words, self.rows = words, rows

    def entries(self, results: Results, retain: Results | None) -> Results:
        """Make the entries: ``forget_no_word`` of the generations in ``forget_Q_A_ROUGE`` and so on."""
        made: Results = {}
        for name, rows in self.rows.items():
            theirs = self._measure(name, retain) if retain is not None and rows else None
            for figure, of_figure in self._measure(name, results).items():
                made[f"{_prefix(name)}_{figure}"] = of_figure
                if theirs:
                    of_figure["retain_model"] = {"agg_value": aggregate_of(figure, theirs[figure]), **theirs[figure]}
                elif theirs is not None:
                    of_figure["retain_model"] = {"agg_value": None, "reason": NO_GENERATIONS}
        return made

    def reasons(self) -> dict[str, str]:
        """Say for each figure why it is null, if it is."""
        no_words = "language is None" if self.words is None else "no generation has a word in it"
        of_figure = dict.fromkeys(FIGURES[:2], no_words) | {"rep_4": f"no generation has {_N} words"}
        return {f"{_prefix(name)}_{figure}": reason for name in self.rows for figure, reason in of_figure.items()}

    def _measure(self, name: str, results: Results) -> dict[str, dict[str, Any]]:
        """Make the entry of each figure; none where the results hold no generations for these rows."""
        generations = self._generations(name, results)
        if generations is None:
            return {}
        found = [
            measure(generation, {key(word) for text in row for word in split(text)}, self.words)
            for row, generation in zip(self.rows[name], generations, strict=True)
        ]
        return {figure: entry(one[figure] for one in found if figure in one) for figure in FIGURES}

    def _generations(self, name: str, results: Results) -> list[Generation] | None:
        """Read the generations of an entry, or None where it has none for these rows."""
        by_index = results.get(name, {}).get("value_by_index", {})
        values = [by_index.get(str(number)) or {} for number in range(len(self.rows[name]))]
        for value, (_, answer) in zip(values, self.rows[name], strict=True):
            if not isinstance(value.get("generation"), str) or value.get("ground_truth") != answer:
                return None
        return [Generation(value["generation"], bool(value.get("cut_off"))) for value in values]


def _prefix(name: str) -> str:
    """Return how the names of an entry's figures begin."""
    return name.removesuffix("_ROUGE").removesuffix("_Q_A")
