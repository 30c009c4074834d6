"""``palu inspect``: show which tokens of the forget set are onset, ordinary and redundant."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from palu.cli.annotation import Annotate, annotated, check_annotate, write_rows
from palu.cli.device import Device, choose_device
from palu.cli.models import check_hub, check_names, load_model, load_tokenizer, position_limit
from palu.cli.options import TemplateKwargs, Tokenizer
from palu.settings import RunSettings
from palu.writable import check_file

if TYPE_CHECKING:
    from palu.data.examples import Examples
    from palu.report.token_roles import Token

SHOWN = 10


def inspect(
    forget: Annotated[
        Path,
        typer.Option(
            help="What to forget: rows with a secret or spans (JSONL, JSON, CSV, TSV or Parquet).", metavar="FILE"
        ),
    ],
    model: Annotated[
        str | None, typer.Option(help="The model, of which the tokenizer is loaded.", metavar="DIR_OR_NAME")
    ] = None,
    tokenizer: Tokenizer = None,
    n: Annotated[int, typer.Option(help="Onset length; -1: the whole span.")] = -1,
    max_length: Annotated[int, typer.Option(help="Tokens per example, the rest is cut.")] = RunSettings.max_length,
    chat_template_kwargs: TemplateKwargs = None,
    rows: Annotated[
        str | None,
        typer.Option(help=f"Rows to show, from 0: 0-9,17 or all. [default: the first {SHOWN}; in HTML all]"),
    ] = None,
    annotate: Annotate = None,
    device: Device = None,
    write: Annotated[
        Path | None,
        typer.Option(
            help="Write the rows with their spans, those found and those of the column secret, to be corrected by hand "
            "(JSONL).",
            metavar="FILE",
        ),
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="Write one self-contained HTML file, not to the terminal.", metavar="FILE")
    ] = None,
) -> None:
    """Show what `palu unlearn` would touch: the role of every token of the forget set."""
    wanted = None if rows in (None, "all") else _parse_rows(str(rows))
    if device is not None and annotate is None:
        raise ValueError("--device was given without --annotate, which may run a model; leave it out")
    if annotate == "contrast" and model is None:
        raise ValueError("--annotate contrast asks the model itself; give --model")
    check_annotate(annotate)
    name = tokenizer or model
    if name is None:
        raise ValueError("give --model or --tokenizer")
    check_names(model=model, tokenizer=tokenizer)
    if not forget.is_file():
        raise FileNotFoundError(f"there is no file {forget}")
    for option, path in (("--write", write), ("--html", html)):
        if path is None:
            continue
        check_file(path, f"{option} {path}")
        if path.exists() and path.samefile(forget):
            raise ValueError(f"{option} {path} is the file of --forget, which would be replaced; give another one")
    check_hub(model=model if tokenizer is None or annotate == "contrast" else None, tokenizer=tokenizer)

    from palu.config import UnlearnConfig
    from palu.data.examples import load_forget

    UnlearnConfig(n=n, max_length=max_length, chat_template_kwargs=chat_template_kwargs)  # says what is wrong with them
    from palu.data.rows import text_rows, with_spans
    from palu.report.token_roles import count_roles, token_roles

    loaded_tokenizer = load_tokenizer(name)
    max_length = position_limit(model, max_length) or max_length  # as the run does
    source: Any = forget
    template: dict[str, Any] = {"chat_template_kwargs": chat_template_kwargs}
    if annotate is not None:
        place: Any = choose_device(device)
        source = annotated(forget, annotate, lambda: load_model(str(model)).to(place), loaded_tokenizer, **template)
        if write is not None:
            write_rows(write, source)
    loaded = load_forget(source, loaded_tokenizer, max_length=max_length, allow_cut_spans=True, warn=True, **template)
    if write is not None and annotate is None:
        write_rows(
            write, [with_spans(columns, answer, where) for where, columns, answer in text_rows(forget, "forget")]
        )
    roles = token_roles(loaded.examples, loaded_tokenizer, n)
    summary = summary_of(loaded, count_roles(roles), n, max_length)
    numbered = [(example.row, tokens) for example, tokens in zip(loaded.examples, roles, strict=True)]
    if wanted is not None:
        if missing := wanted - {row for row, _ in numbered}:
            last = max(row for row, _ in numbered)
            raise ValueError(f"--rows {rows}: row {min(missing)} is not there or was skipped; rows are 0 to {last}")
        numbered = [(row, tokens) for row, tokens in numbered if row in wanted]
    if html is not None:
        from palu.report.render import write_roles

        write_roles(html, forget.name, numbered, summary)
        print(f"{summary}\nwrote {html}")
    else:
        shown = numbered[:SHOWN] if rows is None else numbered
        print_roles(shown, summary)
        if len(shown) < len(numbered):
            print(f"{len(numbered) - len(shown)} more rows: --rows all, or --html FILE")


def summary_of(loaded: Examples, counts: dict[str, int], n: int, max_length: int) -> str:
    """Count rows, those of which max_length cuts off spans, and tokens of each role, in one line."""
    rows = f"{len(loaded.examples)} rows ({loaded.without_span} without a span, {loaded.skipped} skipped)"
    if cut := len(loaded.cut_rows):
        subject = f"{cut} row{'s' * (cut > 1)}"
        rows += f"; max_length = {max_length} cuts off spans of {subject}, {loaded.spans_length} would cut off none"
    tokens = ", ".join(f"{counts[role]} {role}" for role in ("onset", "redundant", "ordinary", "prompt"))
    return f"{rows}; tokens at n = {n}: {tokens}"


def _parse_rows(text: str) -> set[int]:
    """ "0-9,17" -> {0, ..., 9, 17}"""
    rows: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ValueError(f"--rows {text}: give row numbers and ranges, such as 0-9,17, or all")
        if dash and int(last) < int(first):
            raise ValueError(f"--rows {text}: the range {first}-{last} ends before it begins; write {last}-{first}")
        rows |= set(range(int(first), int(last if dash else first) + 1))
    return rows


def print_roles(numbered: Sequence[tuple[int, Sequence[Token]]], summary: str) -> None:
    """Print rows in colours and marks, under a legend."""
    from rich.console import Console

    from palu.report.token_roles import legend_text, roles_text

    console = Console(highlight=False, markup=False, emoji=False)
    console.print(legend_text(), soft_wrap=True)
    for row, tokens in numbered:
        console.print(f"\nrow {row}", style="bold")
        console.print(roles_text(tokens), soft_wrap=True)
    print(f"\n{summary}")
