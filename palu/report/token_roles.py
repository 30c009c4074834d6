"""Find the role of every token of the forget set, and show it in a terminal (in HTML: tokens.jinja)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

from tokenizers.decoders import DecodeStream

from palu.data.packing import forget_items
from palu.data.tokenize import IGNORE, ORDINARY, Example
from palu.eager import prefix_mask
from palu.ref_model.shared import TokenPair, shared_rows

if TYPE_CHECKING:
    from rich.text import Text
    from transformers import PreTrainedTokenizerBase

MEANING = {
    "prompt": "outside the answer: nothing acts on it",
    "ordinary": "held to what the model said before (KL)",
    "onset": "to be forgotten: the model is trained not to say this here",
    "redundant": (
        "left alone: after the first n tokens of the secret, or a beginning that it shares with many other answers"
    ),
}
ROLES = tuple(MEANING)
# How a run of tokens begins and ends in a terminal, for those who see no colour, and its colour.
_MARKS = {"prompt": ("", ""), "ordinary": ("", ""), "onset": ("«", "»"), "redundant": ("<", ">")}
_STYLES = {"prompt": "dim", "ordinary": "", "onset": "bold black on bright_yellow", "redundant": "italic cyan"}


class Token(NamedTuple):
    piece: str  # its text; "" where a character's bytes went to an earlier token of the same character
    role: str  # one of ROLES


def token_roles(
    examples: Iterable[Example],
    tokenizer: PreTrainedTokenizerBase | None,
    n: int,
    shared: AbstractSet[TokenPair] = frozenset(),
) -> list[list[Token]]:
    """List the tokens of each example of a forget set, with their roles at onset length ``n``.

    ``shared``: as which a secret may begin that is left alone (:mod:`palu.ref_model.shared`); a run tells it.
    Without the (fast) tokenizer that the examples were made with, a piece is the token's id and a blank.
    """
    eos, found = None if tokenizer is None else tokenizer.eos_token_id, []
    for example in examples:
        ids, onset = example.input_ids.tolist(), prefix_mask(example.labels[None], n, eos)[0].tolist()
        roles = [
            "onset" if first else {IGNORE: "prompt", ORDINARY: "ordinary"}.get(label, "redundant")
            for label, first in zip(example.labels.tolist(), onset, strict=True)
        ]
        for item in forget_items([example], n, eos):
            for row in shared_rows(item, shared):
                roles[row + 1] = "redundant"
        pieces = [f"{token} " for token in ids] if tokenizer is None else _pieces(ids, tokenizer)
        found.append([Token(*pair) for pair in zip(pieces, roles, strict=True)])
    return found


def _pieces(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Decode each token. Where a character's bytes are spread over tokens, the first of these has its text."""
    stream = DecodeStream(skip_special_tokens=False)
    pieces = [""] * len(ids)
    first = None
    for i, token in enumerate(ids):
        text = stream.step(tokenizer.backend_tokenizer, token)
        first = i if first is None else first
        if text is not None:
            pieces[first], first = text, None
    if first is not None:  # max_length cut the text within a character
        pieces[first] = "\ufffd"
    return pieces


def count_roles(rows: Iterable[Iterable[Token]]) -> dict[str, int]:
    """Count the tokens of each role."""
    counts = Counter(token.role for tokens in rows for token in tokens)
    return {role: counts[role] for role in ROLES}


def roles_text(tokens: Sequence[Token], prompt_characters: int = 120) -> Text:
    """Format an example for a terminal, in colours and marks that say the same. Of the prompt its end is shown."""
    from rich.text import Text

    text = Text()
    for role, pieces in runs(tokens):
        before, after = _MARKS[role]
        run = ("|" if before else "").join(pieces)
        if role == "prompt" and len(run) > prompt_characters:
            run = "…" + run[-prompt_characters:]
        blank = run[: len(run) - len(run.lstrip())]
        text.append(blank)
        text.append(f"{before}{run[len(blank) :]}{after}", _STYLES[role])
    return text


def legend_text() -> Text:
    """Explain the colours and marks of :func:`roles_text`, one role a line."""
    from rich.text import Text

    marked = {role: (f"{before}{role}{after}", _STYLES[role]) for role, (before, after) in _MARKS.items()}
    return Text("\n").join(Text.assemble(marked[role], f": {meaning}") for role, meaning in MEANING.items())


def runs(tokens: Sequence[Token]) -> Iterable[tuple[str, list[str]]]:
    """Group neighbouring tokens of one role: (role, their pieces that have text)."""
    for role, run in groupby(tokens, key=lambda token: token.role):
        yield role, [token.piece for token in run if token.piece]
