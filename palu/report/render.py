"""Write ``private/report.html``, to look at, and ``model/README.md``, the model card for the hub.

Both are made from the files in the run's ``private/`` alone (``record.json`` of :class:`palu.Recorder`,
``summary.json``, ``history.jsonl``, and ``evaluation*.json`` and ``audit.json`` where there are any), so they can be
made again after an evaluation or an audit.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import ModelCardData
from markupsafe import Markup

from palu.report import view, words
from palu.report.layout import CARD, MODEL, PRIVATE
from palu.report.plots import number
from palu.report.token_roles import MEANING, Token, runs

HERE = Path(__file__).parent


def write_report(run_dir: str | os.PathLike[str], *, redact: bool = False) -> Path:
    """Write ``private/report.html``: one file that asks for nothing else, runs no script and opens offline.

    It shows the forgotten text, so it is as private as the forget set. With ``redact`` each marked text is blotted out
    wherever its words stand, the model's answers to the forget set and its hashes are left out, and the file is
    ``report-redacted.html``; a secret told in other words, in a question for example, would still be there.

    Returns:
        The file's path.

    Raises:
        RecordError: the folder's records are missing or damaged.
    """
    folder = Path(run_dir) / PRIVATE
    shown = view.page(folder, redact=redact)
    style = Markup((HERE / "report.css").read_text(encoding="utf-8"))
    path = folder / ("report-redacted.html" if redact else "report.html")
    _write(path, "report.html.jinja", autoescape=True, style=style, **shown)
    return path


def write_card(run_dir: str | os.PathLike[str]) -> Path:
    """Write ``model/README.md``, the hub's model card: what was done and how it came out, and no text of the sets.

    The base model is named where it came from the hub, the licence where the base model's card names one. Raises
    RecordError as :func:`write_report`.
    """
    folder = Path(run_dir) / MODEL
    shown = view.page(Path(run_dir) / PRIVATE, redact=True)
    model = shown["record"]["model"]
    metadata = ModelCardData(
        base_model=model["name"] if model["on_the_hub"] else None,
        library_name="peft" if (folder / "adapter_config.json").exists() else "transformers",
        license=model["license"],
        pipeline_tag="text-generation",
        tags=["unlearning", "machine-unlearning", "palu"],
    )
    path = folder / CARD
    _write(path, "card.md.jinja", autoescape=False, metadata=metadata.to_yaml(), **shown)
    return path


def write_roles(path: Path, title: str, rows: Iterable[tuple[int, Sequence[Token]]], summary: str) -> None:
    """Write one HTML file with the roles of the tokens of rows, each with its number, under a title and a summary."""
    shown = {"title": title, "rows": rows, "summary": summary}
    _write(path, "roles.html.jinja", autoescape=True, runs=runs, meanings=MEANING, **shown)


def _write(path: Path, template: str, *, autoescape: bool, **values: Any) -> None:
    # Line ends as they are: a checksum of the file is the same on every system.
    path.write_bytes((_template(template, autoescape).render(values).rstrip() + "\n").encode())


@cache
def _template(name: str, autoescape: bool) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=autoescape,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": number,
        "probability": words.probability,
        "count": words.count,
        "percent": words.percent,
        "duration": words.duration,
    }
    return environment.get_template(name)
