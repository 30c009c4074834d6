"""What the commands share: options and their help in sections, files that must be there, a run's folder, tables."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperCommand

from palu.layout import FORGET, MODEL, PRIVATE, check_finished
from palu.writable import check_file

ABBREVIATED = {"lr": "learning_rate"}  # what other tools call a setting
NAME = "DIR_OR_NAME"  # of a model or tokenizer
_CHANGED = "palu.changed"  # in a context's meta: a run's retain file that is another one by now


class SectionedCommand(TyperCommand):
    """A command that reads its options' help from its docstring, and lists them in sections.

    Those with a ``rich_help_panel`` stand under its name.
    """

    def __init__(self, *args: Any, help: str, params: list[Any], **settings: Any):
        texts = described(help, "Args")
        for parameter in params:
            parameter.help = texts.get(parameter.name, parameter.help)
        super().__init__(*args, help=help.partition("Args:\n")[0].rstrip(), params=params, **settings)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the command line; of an option that does not exist, say what it may have been meant for."""
        try:
            return super().parse_args(ctx, args)
        except typer.TyperException as error:
            meant = ABBREVIATED.get(getattr(error, "option_name", "").lstrip("-"))
            if meant in {parameter.name for parameter in self.params}:
                error.possibilities = [flag(str(meant))]  # type: ignore[attr-defined]
            raise

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the options; Typer itself makes sections only through rich."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            if (record := parameter.get_help_record(ctx)) is not None:
                sections.setdefault(getattr(parameter, "rich_help_panel", None) or "Options", []).append(record)
        for name, records in sections.items():
            with formatter.section(name):
                formatter.write_dl(records)


def described(docstring: str, section: str) -> dict[str, str]:
    """Read the entries of a docstring's section by name, as plain text."""
    entries = re.findall(
        r"^    (\w+): (.*(?:\n     .*)*)", inspect.cleandoc(docstring).partition(f"{section}:\n")[2], re.MULTILINE
    )
    plain = ((name, " ".join(re.sub(r"``|:\w+:|`", "", text).split())) for name, text in entries)
    return {name: text[0].upper() + text[1:] for name, text in plain}


def json_value(value: Any) -> Any:
    """Parse JSON text; a value that ``--config`` has given a type stays as it is."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError as error:
        fix = 'write a mapping, such as {"enable_thinking": false}'
        raise typer.BadParameter(f"{value!r} is not JSON ({error.msg} at character {error.pos}); {fix}") from None


def flag(name: str) -> str:
    """Return the flag of a command's parameter."""
    return f"--{name.replace('_', '-')}"


def given_by(ctx: typer.Context, name: str) -> str:
    """Return where an option's value comes from: COMMANDLINE, DEFAULT_MAP (a run's folder, ``--config``) or DEFAULT."""
    source = ctx.get_parameter_source(name)
    return "DEFAULT" if source is None else source.name


def check_files(**files: Path | None) -> None:
    """Raise FileNotFoundError where the file given for an option is not there."""
    for name, file in files.items():
        if file is not None and not file.is_file():
            raise FileNotFoundError(f"{flag(name)} {file}: there is no such file")


def check_output_file(name: str, path: Path, **inputs: Path | list[Path] | None) -> None:
    """Raise OSError where an option's file cannot be written, ValueError where it is one of these options' input."""
    check_file(path, f"{flag(name)} {path}")
    for option, given in inputs.items():
        for file in given if isinstance(given, list) else [given]:
            if file is not None and path.exists() and path.samefile(file):
                raise ValueError(
                    f"{flag(name)} {path} is the file of {flag(option)}, which would be replaced; give another one"
                )


def check_run(run: Path) -> None:
    """Raise FileNotFoundError or ValueError where this is not the folder of a finished run."""
    if not run.is_dir():
        raise FileNotFoundError(f"there is no folder {run}")
    check_finished(run)


def check_unchanged(ctx: typer.Context, name: str, *files: Path | None) -> None:
    """Raise ValueError where a file that a run's folder gave an option has changed since the run."""
    changed = ctx.meta.get(_CHANGED)
    if changed in files and given_by(ctx, name) == "DEFAULT_MAP":
        raise ValueError(
            f"{changed} has changed since the run in {ctx.params['run']}; restore it, or give {flag(name)}"
        )


def print_table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    """Print rows under the names of their columns."""
    from rich.console import Console
    from rich.table import Column, Table

    table = Table(*(Column(name, overflow="fold") for name in columns), box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    Console(highlight=False, markup=False, emoji=False).print(table)


def _read_run(ctx: typer.Context, run: Path | None) -> Path | None:
    """Make what a run of ``palu unlearn`` was given the defaults of the command's options."""
    if run is None or ctx.resilient_parsing:
        return run
    from palu.hashing import file_digest
    from palu.report.reading import read_run
    from palu.training.requests import read_requests

    check_run(run)
    private = run / PRIVATE
    record, summary, _ = read_run(private)
    given, config = summary.get("arguments", {}), summary["config"]
    values = {
        "model": str(run / MODEL),
        "original": given.get("original" if given.get("after") else "model"),
        "tokenizer": given.get("tokenizer"),
        "forget": str(private / FORGET) if (private / FORGET).is_file() else None,
        "retain": None if given.get("retain") in ("auto", "none") else given.get("retain"),
        "output": str(run) if ctx.info_name == "audit" else None,
        "n": config.get("n"),
        "chat_template_kwargs": config.get("chat_template_kwargs"),
    }
    if values["forget"] is not None:
        read_requests(private)  # complains where they have changed
    retain, digest = values["retain"], record["data"]["retain"].get("file_sha256")
    if retain is not None and Path(retain).is_file() and digest not in (None, file_digest(Path(retain))):
        ctx.meta[_CHANGED] = Path(retain)  # refused where no option replaces it, which is not known yet
    asked = [given["eval_rows"]] if given.get("eval_rows") else [values["forget"], values["retain"]]
    values["rows"] = [file for file in asked if file is not None] or None
    ctx.default_map = {name: value for name, value in values.items() if value is not None}
    return run


# --- options of several commands; a command's docstring describes those without help ---
def option(metavar: str | None = None, help: str | None = None, **settings: Any) -> Any:
    """Declare an option."""
    return typer.Option(metavar=metavar, help=help, **settings)


RunFolder = Annotated[
    Path | None,
    typer.Argument(
        callback=_read_run,
        is_eager=True,
        metavar="RUN",
        help="The folder of a run of palu unlearn, from which the options come that are not given.",
    ),
]
Name = Annotated[str, option(NAME)]
OptionalName = Annotated[str | None, option(NAME)]
OptionalFile = Annotated[Path | None, option("FILE")]
Folder = Annotated[Path, option("DIR")]
Forget = Annotated[
    Path, option("FILE", "The forget set: rows with a secret or spans (JSONL, JSON, CSV, TSV or Parquet).")
]
Tokenizer = Annotated[str | None, option(NAME, "The tokenizer, if it is not the model's.")]
DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
Dtype = Annotated[DtypeName, option(help="Of the weights; auto: as they are stored.")]
Bits = Literal["4bit", "8bit"]
Device = Annotated[
    str | None,
    option(
        "DEVICE",
        "Where the model runs: cpu, cuda, cuda:1, mps, ... [default: the first GPU that torch sees, else the CPU]",
    ),
]
TemplateKwargs = Annotated[
    Any,
    option("<json>", 'Values for the chat template, by name, such as {"enable_thinking": false}.', parser=json_value),
]
Progress = Annotated[bool, option(help="Show progress bars.")]
