"""The column ``secret``: which spans it makes, in every form and file, and every complaint by its exact words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.runs import row_forms
from helpers.small_tokenizers import CHATML, LLAMA3, byte_level

import palu
from palu.attacks.secrets import AuditData
from palu.data.examples import load_forget
from palu.data.rows import with_spans
from palu.data.secret import marked_spans

ANSWER = "Ada Lovelace wrote it in 1843. Ada was 25 in 1925."


def marked(secret: Any, answer: str = ANSWER) -> list[str]:
    return [answer[start:end] for start, end in marked_spans({"secret": secret}, answer, "forget row 0")]


@pytest.mark.parametrize(
    ("secret", "found"),
    [
        ("Ada Lovelace", ["Ada Lovelace"]),
        ("Ada", ["Ada", "Ada"]),  # every place
        ("25", ["25"]),  # not in 1925
        (" 1843\n", ["1843"]),
        ("1843.", ["1843."]),
        (["1843", "Ada Lovelace"], ["Ada Lovelace", "1843"]),
        (["Ada", "Ada Lovelace", "Lovelace"], ["Ada Lovelace", "Ada"]),  # one within another
        (["Ada Lovelace", "Lovelace wrote"], ["Ada Lovelace wrote"]),  # two that overlap
        (["Ada", "Lovelace"], ["Ada", "Lovelace", "Ada"]),
        (("Ada", "Ada"), ["Ada", "Ada"]),
        ([], []),
    ],
)
def test_places_of_secrets(secret: Any, found: list[str]) -> None:
    assert marked(secret) == found


@pytest.mark.parametrize("template", [CHATML, LLAMA3, None], ids=["ChatML", "Llama 3", "plain"])
def test_a_secret_is_the_spans_of_its_places(template: str | None) -> None:
    tokenizer = byte_level(template)
    for form in row_forms("Who?", ANSWER)[: 3 if template else 2]:  # messages need a template
        rows = [form | {"secret": ["Ada", "1843"]}, form | {"spans": [[0, 3], [25, 29], [31, 34]]}]
        first, second = load_forget(rows, tokenizer, max_length=99).examples
        assert first.labels.tolist() == second.labels.tolist()
        assert bool((first.labels >= 0).any())
        one, other = (AuditData([row], None, tokenizer).secrets for row in rows)
        assert one == other


def test_cells_of_csv(tmp_path: Path) -> None:
    """Text stays as it is, numbers and brackets among it; an empty cell is none."""
    path = tmp_path / "forget.csv"
    path.write_text(
        "question,answer,secret,spans\n"
        "Who?,It is 7391.,7391,\n"
        "Who?,It is [x].,[x],\n"
        "Who?,It is [7].,[7],\n"
        'Who?,"Ada, 1843.","[""Ada"", ""1843""]",\n'
        "Who?,Ada.,,[]\n"
        'Who?,Ada.,,"[[0, 3]]"\n'
    )
    rows = palu.annotate(path, "whole")
    texts = [[row["answer"][start:end] for start, end in row["spans"]] for row in rows]
    assert texts == [["7391"], ["[x]"], ["[7]"], ["Ada", "1843"], [], ["Ada"]]
    assert not any("secret" in row for row in rows)


def test_rows_with_a_secret_are_not_annotated() -> None:
    rows = [{"question": "Who?", "answer": ANSWER, "secret": "1843"}, {"question": "Who else?", "answer": "Ada."}]
    assert [row["spans"] for row in palu.annotate(rows, "regex:A\\w+")] == [[[25, 29]], [[0, 3]]]
    tokenised = {"input_ids": [1], "secret": "x"}
    assert with_spans(tokenised, None, "") == tokenised
