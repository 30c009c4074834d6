"""Find rows that are given twice: within a set, and in the forget set and the retain set at once."""

from __future__ import annotations

import hashlib
import warnings
from array import array

from palu.data.files import DataError
from palu.data.tokenize import IGNORE, Example

_NAMED = 10  # how many pairs of rows a message names


class RowHashes:
    """A hash of prompt and answer for each row of a set, in 16 bytes a row.

    Rows are the same if they have the same tokens, whole and not only up to max_length, and the same of these are
    answer. Of a million rows two others have one hash with a probability of 3e-8.
    """

    def __init__(self) -> None:
        self.rows, self.hashes = array("q"), array("q")

    def append(self, example: Example) -> None:
        """Add a row that max_length has not cut."""
        sha = hashlib.blake2b(example.input_ids.numpy().tobytes(), digest_size=8)
        sha.update((example.labels != IGNORE).numpy().tobytes())
        self.rows.append(example.row)
        self.hashes.append(int.from_bytes(sha.digest(), "little", signed=True))

    def first_rows(self) -> dict[int, int]:
        """Return the first row of each hash."""
        return dict(zip(reversed(self.hashes), reversed(self.rows), strict=True))


def warn_of_repeats(found: RowHashes, name: str) -> None:
    """Warn of rows that repeat an earlier one, naming the first of them."""
    first = found.first_rows()
    repeats = [(row, first[one]) for row, one in zip(found.rows, found.hashes, strict=True) if first[one] != row]
    if not repeats:
        return
    told = ", ".join(f"{row} (as {earlier})" for row, earlier in repeats[:_NAMED]) + ", ..." * (len(repeats) > _NAMED)
    problem = f"{len(repeats)} row{'s' * (len(repeats) > 1)} repeat{'s' * (len(repeats) == 1)} an earlier one"
    mend = "keep each row once" + ", with all that is to be forgotten in it" * (name == "forget")
    warnings.warn(f"{name} set: {problem}, so that it weighs more: {told}; {mend}", stacklevel=2)


def check_disjoint(forget: RowHashes, retain: RowHashes) -> None:
    """Raise DataError where a row is in both sets: a model cannot forget an answer and keep it."""
    first = forget.first_rows()
    both = [(first[one], row) for row, one in zip(retain.rows, retain.hashes, strict=True) if one in first]
    if not both:
        return
    more = f" (and {len(both) - 1} more)" * (len(both) > 1)
    raise DataError(
        f"forget row {both[0][0]} and retain row {both[0][1]} are the same, prompt and answer{more}: the model cannot "
        "forget an answer and keep it; take the row out of one of the sets"
    )
