"""What the commands' options share: the help in sections, JSON, files that must be there, and a run's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from palu.report.layout import ANNOTATED, MODEL, PRIVATE

ABBREVIATED = {"lr": "learning_rate"}  # what other tools call a setting


class SectionedCommand(TyperCommand):
    """A command whose help lists its options in sections: those with a ``rich_help_panel`` under its name."""

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


def check_files(**files: Path | None) -> None:
    """Raise FileNotFoundError where the file given for an option is not there."""
    for name, file in files.items():
        if file is not None and not file.is_file():
            raise FileNotFoundError(f"{flag(name)} {file}: there is no such file")


def _read_run(ctx: typer.Context, run: Path | None) -> Path | None:
    """Make what a run of ``palu unlearn`` was given the defaults of the command's options."""
    if run is None or ctx.resilient_parsing:
        return run
    from palu.hashing import file_digest
    from palu.report.reading import read_run

    private = run / PRIVATE
    record, summary, _ = read_run(private)
    given, config = summary.get("arguments", {}), summary["config"]
    values = {
        "model": str(run / MODEL),
        "original": given.get("model"),
        "tokenizer": given.get("tokenizer"),
        "forget": str(private / ANNOTATED) if given.get("annotate") else given.get("forget"),
        "retain": None if given.get("retain") in ("auto", "none") else given.get("retain"),
        "output": str(run) if ctx.info_name == "audit" else None,
        "n": config.get("n"),
        "chat_template_kwargs": config.get("chat_template_kwargs"),
    }
    for name in ("forget", "retain"):
        file, digest = values[name], record["data"][name].get("file_sha256")
        if file is not None and Path(file).is_file() and digest not in (None, file_digest(Path(file))):
            raise ValueError(f"{file} has changed since the run in {run}; restore it, or give --{name}")
    values["rows"] = [given["eval_rows"]] if given.get("eval_rows") else [values["forget"], values["retain"]]
    values["rows"] = [file for file in values["rows"] if file is not None] or None
    ctx.default_map = {name: value for name, value in values.items() if value is not None}
    return run


def of_run(ctx: typer.Context, name: str) -> bool:
    """Whether an option's value comes from the folder of a run."""
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "DEFAULT_MAP"


RunFolder = Annotated[
    Path | None,
    typer.Argument(
        callback=_read_run,
        is_eager=True,
        metavar="RUN",
        help="The folder of a run of palu unlearn, from which the options come that are not given.",
    ),
]

Tokenizer = Annotated[str | None, typer.Option(help="The tokenizer, if it is not the model's.", metavar="DIR_OR_NAME")]

TemplateKwargs = Annotated[
    Any,
    typer.Option(
        parser=json_value,
        metavar="<json>",
        help='Values for the chat template, by name, such as {"enable_thinking": false}.',
    ),
]
