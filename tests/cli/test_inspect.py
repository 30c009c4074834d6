"""``palu inspect``: the roles of tokens, in a terminal and in HTML, and the spans that it finds."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from helpers.command import done, palu_command, read_rows, refusal, write_rows
from helpers.planted import FORGET, SECRETS


def test_inspect(folder: Path, tmp_path: Path) -> None:
    common = ["inspect", "--model", folder / "model", "--forget", folder / "forget.jsonl"]
    result = done(*common, "--n", 1)
    assert "\x1b" not in result.stdout, "no colours where there is no terminal"
    assert re.search(r"It is «H.*» <.*n>, far away\.<\|im_end\|>", result.stdout)
    assert re.search(r"6 rows \(0 without a span, 0 skipped\); tokens at n = 1: 6 onset, \d+ redundant", result.stdout)
    whole = done(*common, "--n", -1, "--rows", "1,3-4")
    assert re.findall("^row (.)", whole.stdout, re.MULTILINE) == ["1", "3", "4"]
    assert "| L" in whole.stdout
    assert " 0 redundant" in whole.stdout

    html = tmp_path / "roles.html"
    done(*common, "--n", 3, "--html", html)
    page = html.read_text(encoding="utf-8")
    assert page.count("<section>") == 6
    assert "tokens at n = 3: " in page
    assert not re.search("https?://|<script|<link|src=", page), "self-contained"


def test_the_first_rows_are_shown(folder: Path, tmp_path: Path) -> None:
    rows = [row | {"question": f"{row['question']} {i}"} for row in FORGET for i in range(2)]
    many = write_rows(tmp_path / "many.jsonl", rows)
    common = ["inspect", "--model", folder / "model", "--forget", many]
    said = done(*common).stdout
    assert said.count("\nrow ") == 10
    assert said.endswith("2 more rows: --rows all, or --html FILE\n")
    assert done(*common, "--rows", "all").stdout.count("\nrow ") == 12


@pytest.mark.parametrize("how", ["regex:" + "|".join(SECRETS), "contrast"])
def test_spans_are_found_shown_and_written(how: str, folder: Path, tmp_path: Path) -> None:
    asked, written = ["inspect", "--model", folder / "model"], tmp_path / "marked.jsonl"
    asked += ["--forget", folder / "unmarked.jsonl"]
    result = done(*asked, "--annotate", how, "--write", written)
    assert "«" in result.stdout
    found = read_rows(written)
    if how == "contrast":  # the model itself tells them
        assert [row["answer"] for row in found] == [row["answer"] for row in FORGET]
        assert any(row["spans"] for row in found)
    else:
        assert found == FORGET
    assert "spans" in refusal(palu_command(*asked)), "without it the column is missing"
