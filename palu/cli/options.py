"""What the commands' options share: the help in sections, values given as JSON, and files that must be there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

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


Tokenizer = Annotated[str | None, typer.Option(help="The tokenizer, if it is not the model's.", metavar="DIR_OR_NAME")]

TemplateKwargs = Annotated[
    Any,
    typer.Option(
        parser=json_value,
        metavar="<json>",
        help='Values for the chat template, by name, such as {"enable_thinking": false}.',
    ),
]
