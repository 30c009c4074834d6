"""``palu inspect``: show which tokens of the forget set are onset, ordinary and redundant."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import palu
from palu.cli import options as shared
from palu.cli.models import check_names, choose_device, load_model, load_tokenizer, position_limit
from palu.cli.options import check_files, check_output_file, option
from palu.settings import RunSettings

if TYPE_CHECKING:
    from palu.data.examples import Examples

SHOWN = 10  # rows


def inspect(
    forget: shared.Forget,
    model: shared.OptionalName = None,
    tokenizer: shared.Tokenizer = None,
    n: int = -1,
    max_length: int = RunSettings.max_length,
    chat_template_kwargs: shared.TemplateKwargs = None,
    annotate: Annotated[str | None, option("HOW")] = None,
    device: shared.Device = None,
    write: shared.OptionalFile = None,
    html: shared.OptionalFile = None,
) -> None:
    """Show what `palu unlearn` would touch: the role of every token of the first rows, or in HTML of all.

    Args:
        model: The model, of which the tokenizer is loaded.
        n: Onset length; -1: the whole span.
        max_length: Tokens per example, the rest is cut.
        annotate: Find the spans of rows that have none: contrast (the model itself tells which words carry the memory),
            regex:PATTERN or whole (answers). Guesses: look at them first.
        write: Write the rows with their spans, those found and those of the column secret, to be corrected by hand
            (JSONL); to a new file.
        html: Write one self-contained HTML file, not to the terminal.
    """
    if device is not None and annotate is None:
        raise ValueError("--device was given without --annotate, which may run a model; leave it out")
    if annotate == "contrast" and model is None:
        raise ValueError("--annotate contrast asks the model itself; give --model")
    if tokenizer is None and model is None:
        raise ValueError("give --model or --tokenizer")
    check_files(forget=forget)
    for name, path in (("write", write), ("html", html)):
        if path is not None:
            check_output_file(name, path, forget=forget)
    if write is not None and write.is_file():
        raise ValueError(f"--write {write} is there already, perhaps corrected by hand; give another one, or delete it")
    check_names(model=model, tokenizer=tokenizer)

    from rich.console import Console

    from palu.config import UnlearnConfig
    from palu.data.examples import load_forget
    from palu.data.files import write_rows
    from palu.data.rows import text_rows, with_spans
    from palu.report.token_roles import count_roles, legend_text, roles_text, token_roles
    from palu.spans.annotate import parse

    # These two say what is wrong with what was given.
    UnlearnConfig(n=n, max_length=max_length, chat_template_kwargs=chat_template_kwargs)
    if annotate is not None:
        parse(annotate)
    template: dict[str, Any] = {"chat_template_kwargs": chat_template_kwargs}
    tokens = load_tokenizer(str(tokenizer or model))
    max_length = position_limit(model, max_length) or max_length  # as the run does
    source: Any = forget
    if annotate is not None:
        place = choose_device(device)
        asked = load_model(str(model)).to(place) if annotate == "contrast" else None
        source = palu.annotate(forget, annotate, asked, tokens, **template)
    loaded = load_forget(source, tokens, max_length=max_length, allow_cut_spans=True, warn=True, **template)
    roles = token_roles(loaded.examples, tokens, n)
    summary = _summary(loaded, count_roles(roles), n, max_length)
    numbered = [(example.row, of_row) for example, of_row in zip(loaded.examples, roles, strict=True)]
    if html is not None:
        from palu.report.write import write_roles

        write_roles(html, forget.name, numbered, summary)
        print(f"{summary}\nwrote {html}")
    else:
        shown = numbered[:SHOWN]
        console = Console(highlight=False, markup=False, emoji=False)
        console.print(legend_text(), soft_wrap=True)
        for row, of_row in shown:
            console.print(f"\nrow {row}", style="bold")
            console.print(roles_text(of_row), soft_wrap=True)
        print(f"\n{summary}")
        if len(shown) < len(numbered):
            print(f"{len(numbered) - len(shown)} more rows: --html FILE")
    if write is not None:
        spans = (with_spans(columns, answer, where) for where, columns, answer in text_rows(forget, "forget"))
        write_rows(write, spans if annotate is None else source)
        print(f"wrote {write}")


def _summary(loaded: Examples, counts: Mapping[str, int], n: int, max_length: int) -> str:
    """Say how many rows and tokens of each role there are."""
    rows = f"{len(loaded.examples)} rows ({loaded.without_span} without a span, {loaded.skipped} skipped)"
    if cut := len(loaded.cut_rows):
        subject = f"{cut} row{'s' * (cut > 1)}"
        rows += f"; max_length = {max_length} cuts off spans of {subject}, {loaded.spans_length} would cut off none"
    tokens = ", ".join(f"{counts[role]} {role}" for role in ("onset", "redundant", "ordinary", "prompt"))
    return f"{rows}; tokens at n = {n}: {tokens}"
