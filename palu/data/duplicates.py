"""Find rows that are given twice, within a set or in both, and retain rows that tell a secret of the forget set."""

from __future__ import annotations

import html
import unicodedata
import warnings
from array import array
from collections import Counter
from collections.abc import Iterable
from itertools import chain

from palu.data.files import DataError
from palu.data.matching import stands_in
from palu.data.tokenize import IGNORE, Example

NAMED = 10  # how many rows, or pairs of them, a message names


class RowHashes:
    """A hash of prompt and answer for each row of a set, in 16 bytes a row.

    Rows are the same if they have the same tokens, whole and not only up to max_length, and the same of these are
    answer. Of a million rows two others have one hash with a probability of 3e-8. It holds in this process alone.
    """

    def __init__(self) -> None:
        self.rows, self.hashes = array("q"), array("q")

    def append(self, example: Example) -> None:
        """Add a row that max_length has not cut."""
        self.rows.append(example.row)
        self.hashes.append(hash((example.input_ids.numpy().tobytes(), (example.labels != IGNORE).numpy().tobytes())))

    def first_rows(self) -> dict[int, int]:
        """Return the first row of each hash."""
        return dict(zip(reversed(self.hashes), reversed(self.rows), strict=True))


def warn_of_repeats(found: RowHashes, name: str) -> None:
    """Warn of rows that repeat an earlier one, naming the first of them."""
    first = found.first_rows()
    repeats = [(row, first[one]) for row, one in zip(found.rows, found.hashes, strict=True) if first[one] != row]
    if not repeats:
        return
    named = ", ".join(f"{row} (as {earlier})" for row, earlier in repeats[:NAMED]) + ", ..." * (len(repeats) > NAMED)
    problem = f"{len(repeats)} row{'s' * (len(repeats) > 1)} repeat{'s' * (len(repeats) == 1)} an earlier one"
    fix = "keep each row once" + ", with all that is to be forgotten in it" * (name == "forget")
    warnings.warn(f"{name} set: {problem}, so that it weighs more: {named}; {fix}", stacklevel=2)


def check_disjoint(forget: RowHashes, retain: RowHashes, name: str = "forget") -> None:
    """Raise DataError where a row is in both sets: a model cannot forget an answer and keep it."""
    first = forget.first_rows()
    both = [(first[one], row) for row, one in zip(retain.rows, retain.hashes, strict=True) if one in first]
    if not both:
        return
    more = f" (and {len(both) - 1} more)" * (len(both) > 1)
    raise DataError(
        f"{name} row {both[0][0]} and retain row {both[0][1]} are the same, prompt and answer{more}: the model cannot "
        "forget an answer and keep it; take the row out of one of the sets"
    )


def warn_of_told_secrets(secrets: Iterable[tuple[str, str]], answers: Iterable[tuple[str, str]]) -> None:
    """Warn of answers of the retain set that tell a secret of the forget set: (text, its row's name) each.

    Words that many answers hold are hardly secrets: those that few hold are named first.
    """
    rows: dict[str, str] = {}
    by_start: dict[str, list[tuple[str, str]]] = {}  # so that an answer is compared with few secrets
    for secret, where in secrets:
        if secret not in rows:
            letters = _letters(secret)
            by_start.setdefault(letters[: 8 if len(letters) >= 8 else 3], []).append((letters, secret))
            rows[secret] = where
    lengths = {len(start) for start in by_start}
    found: dict[str, list[str]] = {}
    for answer, where in answers:
        letters = _letters(answer)
        starts = {letters[i : i + length] for length in lengths for i in range(len(letters) + 1)}
        near = (one for start in starts & by_start.keys() for one in by_start[start])
        if holds := [secret for wanted, secret in near if wanted in letters and stands_in(secret, answer)]:
            found[where] = holds
    if not found:
        return
    counts = Counter(chain.from_iterable(found.values()))
    pairs = [(*min((counts[secret], secret) for secret in holds), where) for where, holds in found.items()]
    first = sorted(pairs, key=lambda pair: pair[0])[:NAMED]
    named = ", ".join(f"{where} has {secret!r} of {rows[secret]}" for _, secret, where in first)
    problem = "1 answer tells" if len(found) == 1 else f"{len(found)} answers tell"
    warnings.warn(
        f"retain set: {problem} what is to be forgotten: {named}{', ...' * (len(found) > NAMED)}; "
        "take such rows out, or mark less in the forget set",
        stacklevel=2,
    )


def _letters(text: str) -> str:
    """Return the letters and digits of a text, HTML unescaped, without case."""
    return "".join(filter(str.isalnum, unicodedata.normalize("NFKC", html.unescape(text)).casefold()))
