"""Show the role of every token of the forget set, as text for a terminal and as HTML.

======== ===================================== =========================== =====================
role     token                                 what acts on it (PALU)      mark in a terminal
======== ===================================== =========================== =====================
prompt   outside the answer                    nothing                     dim
ordinary of the answer, outside every span     KL to the frozen reference  none
onset    among the first n of its span         the local loss              ``«token|token»``
redundant later in its span                    nothing                     ``<token|token>``
======== ===================================== =========================== =====================
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

from tokenizers.decoders import DecodeStream

from palu.data.tokenize import IGNORE, ORDINARY, Example
from palu.eager import prefix_mask

if TYPE_CHECKING:
    from rich.text import Text
    from transformers import PreTrainedTokenizerBase

ROLES = ("prompt", "ordinary", "onset", "redundant")
MEANING = {
    "prompt": "outside the answer: nothing acts on it",
    "ordinary": "held to what the model said before (KL)",
    "onset": "to be forgotten: the model is trained not to say this here",
    "redundant": "rest of a span, after its first n tokens: nothing acts on it",
}
# How a run of tokens begins and ends in a terminal, for those who see no colour, and its colour.
_MARKS = {"prompt": ("", ""), "ordinary": ("", ""), "onset": ("«", "»"), "redundant": ("<", ">")}
_STYLES = {"prompt": "dim", "ordinary": "", "onset": "bold black on bright_yellow", "redundant": "italic cyan"}


class Token(NamedTuple):
    """One token and its role."""

    piece: str  # its text; "" where a character's bytes went to an earlier token of the same character
    role: str  # one of ROLES


def token_roles(examples: Iterable[Example], tokenizer: PreTrainedTokenizerBase | None, n: int) -> list[list[Token]]:
    """List the tokens of each example of a forget set, with their roles.

    Args:
        examples: of :func:`palu.data.examples.load_forget`.
        tokenizer: the fast tokenizer they were made with; ``None``: a piece is the token's id and a blank.
        n: onset length; -1: whole spans. As in :class:`palu.UnlearnConfig`.
    """
    return [_tokens(example, tokenizer, n) for example in examples]


def _tokens(example: Example, tokenizer: PreTrainedTokenizerBase | None, n: int) -> list[Token]:
    onset = prefix_mask(example.labels[None], n, None if tokenizer is None else tokenizer.eos_token_id)[0].tolist()
    roles = [
        "onset" if first else {IGNORE: "prompt", ORDINARY: "ordinary"}.get(label, "redundant")
        for label, first in zip(example.labels.tolist(), onset, strict=True)
    ]
    ids = example.input_ids.tolist()
    pieces = [f"{token} " for token in ids] if tokenizer is None else _pieces(ids, tokenizer)
    return [Token(*pair) for pair in zip(pieces, roles, strict=True)]


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


# --- terminal ---
def roles_text(tokens: Sequence[Token], prompt_characters: int = 120) -> Text:
    """Format an example for a terminal, in colours and marks that say the same. Of the prompt its end is shown."""
    from rich.text import Text

    text = Text()
    for role, pieces in _runs(tokens):
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

    lines = []
    for role in ROLES:
        before, after = _MARKS[role]
        lines.append(Text.assemble((f"{before}{role}{after}", _STYLES[role]), f": {MEANING[role]}"))
    return Text("\n").join(lines)


# --- HTML ---
CSS = """
.roles { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.9; }
.roles .prompt { opacity: .75; }
.roles .onset, .roles .redundant { border-radius: .2em; padding: .1em 0; }
.roles .onset { background: #ffd54d; color: #1d1600; font-weight: 600; border-bottom: .2em solid #8a5a00; }
.roles .redundant { background: #cfe8f3; color: #06222e; font-style: italic; border-bottom: .2em dotted #0b5c7a; }
.roles b, .roles i { font: inherit; }
.roles b + b, .roles i + i { border-left: 1px solid currentColor; }
.roles .said { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%);
  white-space: nowrap; }
"""


def roles_html(tokens: Sequence[Token]) -> str:
    """Format an example as HTML, to be styled by :data:`CSS`; a screen reader hears where spans begin and end."""
    parts = []
    for role, pieces in _runs(tokens):
        if role == "ordinary":
            parts.append(escape("".join(pieces)))
        elif role == "prompt":
            parts.append(f'<span class="prompt">{escape("".join(pieces))}</span>')
        else:
            tag = "b" if role == "onset" else "i"
            inner = "".join(f"<{tag}>{escape(piece)}</{tag}>" for piece in pieces)
            parts.append(
                f'<span class="{role}" title="{role}"><span class="said">[{role}: </span>{inner}'
                '<span class="said">]</span></span>'
            )
    return f'<div class="roles">{"".join(parts)}</div>'


def legend_html() -> str:
    """Explain the colours of :func:`roles_html`, as an HTML fragment."""
    items = "".join(
        f'<li><span class="roles"><span class="{role}">{role}</span></span>: {MEANING[role]}</li>' for role in ROLES
    )
    return f'<ul class="legend">{items}</ul>'


def _runs(tokens: Sequence[Token]) -> Iterable[tuple[str, list[str]]]:
    """Group neighbouring tokens of one role: (role, their pieces that have text)."""
    for role, run in groupby(tokens, key=lambda token: token.role):
        yield role, [token.piece for token in run if token.piece]
