"""The option ``--annotate`` of ``palu inspect`` and ``palu unlearn``: find spans for rows that have none."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from palu.models.lora import CausalLM

Annotate = Annotated[
    str | None,
    typer.Option(
        help="Find the spans of rows that have none: contrast (the model itself tells which words carry the memory), "
        "regex:PATTERN, ner:MODEL (a token-classification model) or whole (answers). Guesses: look at them first.",
        metavar="HOW",
    ),
]


def check_annotate(how: str | None) -> None:
    """Raise ValueError where ``how`` names no finder, before anything slow is done."""
    if how is not None:
        from palu.spans.annotate import parse

        parse(how)


def annotated(
    forget: Path,
    how: str,
    model: Callable[[], CausalLM],
    tokenizer: PreTrainedTokenizerBase,
    *,
    progress: bool = True,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Return the file's rows with spans. ``model`` is called where the finder needs a model."""
    import palu

    asked = model() if how == "contrast" else None
    return palu.annotate(forget, how, asked, tokenizer, progress=progress, chat_template_kwargs=chat_template_kwargs)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows as JSONL."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
