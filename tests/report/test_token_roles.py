"""palu.roles: every token of the forget set with its role, in a terminal and in HTML."""

from __future__ import annotations

import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.small_tokenizers import LLAMA3, byte_level, sentencepiece
from rich.console import Console

import palu
from palu.data.examples import load_forget
from palu.report.token_roles import ROLES, Token, count_roles, legend_text, roles_text, token_roles
from palu.report.write import write_roles

ROWS: list[dict[str, Any]] = [
    {"question": "Who?", "answer": "Her name is <Hina> Ameen, born\non 06/30/1975.", "spans": [[12, 24], [34, 44]]},
    {"question": "Où? 京都", "answer": "🦊 東京は日本の首都です café.", "spans": [[0, 4]]},
    {"question": "What?", "answer": "The cat sat.", "spans": []},
]
TOKENIZERS = {"byte": byte_level, "chat": lambda: byte_level(LLAMA3), "sentencepiece": sentencepiece}


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("n", [1, 3, -1])
def test_roles_and_pieces(kind: str, n: int) -> None:
    tokenizer = TOKENIZERS[kind]()
    examples = load_forget(ROWS, tokenizer, max_length=99).examples
    for example, tokens in zip(examples, token_roles(examples, tokenizer, n), strict=True):
        # The pieces are the text, none of it lost and none of it twice.
        assert "".join(piece for piece, _ in tokens) == tokenizer.decode(example.input_ids)
        onset = palu.prefix_mask(example.labels[None], n, tokenizer.eos_token_id)[0]
        labels = example.labels
        expected = {
            "prompt": labels == -100,
            "ordinary": labels == -200,
            "onset": onset,
            "redundant": (labels >= 0) & ~onset,
        }
        assert expected.keys() == set(ROLES)
        for role, mask in expected.items():
            assert torch.tensor([token.role == role for token in tokens]).equal(mask)
    assert examples[1].labels.ge(0).sum() > 1, "a character of several tokens is sensitive"


def test_a_character_that_was_cut_off() -> None:
    tokenizer = byte_level()
    whole = load_forget([ROWS[1]], tokenizer, max_length=99).examples[0]
    tokens = token_roles([whole], tokenizer, 3)[0]
    first = next(i for i, token in enumerate(tokens) if "🦊" in token.piece)
    assert tokens[first + 1].piece == "", "else its bytes are one token, and nothing can be cut"
    cut = type(whole)(0, whole.input_ids[: first + 1], whole.labels[: first + 1])
    assert token_roles([cut], tokenizer, 3)[0] == [*tokens[:first], Token("\ufffd", tokens[first].role)]


TOKENS = [
    Token("Q", "prompt"), Token(" A", "prompt"), Token(" is", "ordinary"), Token(" <b", "onset"),
    Token("&", "onset"), Token("", "onset"), Token(" c", "redundant"), Token(".", "ordinary"),
]  # fmt: skip


def test_text() -> None:
    assert count_roles([TOKENS, TOKENS[:1]]) == {"prompt": 3, "ordinary": 2, "onset": 3, "redundant": 1}
    text = roles_text(TOKENS)
    assert text.plain == "Q A is «<b|&» <c>."
    assert [text.plain[s.start : s.end] for s in text.spans if "bold" in str(s.style)] == ["«<b|&»"]
    assert roles_text([Token("x" * 300, "prompt")], prompt_characters=5).plain == "…xxxxx"
    # Without colour the marks alone tell the roles, and the legend tells the marks.
    console = Console(no_color=True, force_terminal=False, width=200)
    with console.capture() as capture:
        console.print(text)
        console.print(legend_text())
    said = capture.get()
    assert "\x1b" not in said
    assert "«onset»: to be forgotten" in said
    assert "<redundant>: left alone: after" in said


def test_html(tmp_path: Path) -> None:
    write_roles(tmp_path / "roles.html", "<set>", [(7, TOKENS)], "1 & only")
    page = (tmp_path / "roles.html").read_text(encoding="utf-8")
    assert "Token roles of &lt;set&gt;" in page and "1 &amp; only" in page and "http" not in page
    legend, html = page.split("<h2>Row 7</h2>")
    assert '<b class="onset">&amp;</b>' in html, "escaped"
    # What a screen reader hears.
    assert "Q A is[onset:  <b&][redundant:  c]." in unescape(re.sub("<[^>]*>", "", html))
    # One tag a token, but for one without text.
    classes = "tokens prompt vh onset onset vh vh redundant vh"
    assert re.findall('class="([a-z]+)"', html) == classes.split()
    assert all(f'class="{role}">{role}</' in legend for role in ROLES)
