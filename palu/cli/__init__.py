"""The ``palu`` command: one module for each of its commands. Slow imports happen where they are used."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import palu
from palu.cli.options import SectionedCommand
from palu.quiet import shorten_warnings, silence_noise
from palu.signals import exit_on_sigterm

# By name: what it does, and the function. Each is imported when it is called: the settings of `unlearn` import torch.
COMMANDS = {
    "inspect": ("Show what `palu unlearn` would touch: the role of every token of the forget set.", "inspect.inspect"),
    "unlearn": ("Make a model forget the spans of the forget set, and write it to a folder.", "unlearn.unlearn"),
    "eval": ("Has a model forgotten, and what does it still know?", "evaluate.evaluate"),
    "audit": ("What does an attacker get out of an unlearned model?", "audit.audit"),
    "report": (
        "Write RUN/private/report.html again, from what runs and evaluations have left there.",
        "report.report",
    ),
    "push": ("Send an unlearned model to the Hugging Face hub, and nothing else of its run.", "push.push"),
    "doctor": ("Tell which native ops are loaded and what serves each device; try every op.", "doctor.doctor"),
}


# Errors that palu and torch raise for what the user can fix, beside Python's own: by name, since imports take long.
FIXABLE = {
    "palu.models.lora.UnsupportedModelError",
    "palu.ref_model.storage.CacheError",
    "palu.training.checkpoint.CheckpointError",
    "palu.training.step.DivergenceError",
    "torch.OutOfMemoryError",
}


class Palu(TyperGroup):
    """The command group: an error that the user can fix is one line, any other keeps its traceback."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        module, function = COMMANDS[cmd_name][1].split(".")
        alone = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False)
        alone.command(cmd_name, cls=SectionedCommand)(getattr(importlib.import_module(f"palu.cli.{module}"), function))
        command: Any = typer.main.get_command(alone)
        command.context_settings = ctx.command.context_settings
        return command

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (text, _) in COMMANDS.items()])

    def main(self, *args: Any, **kwargs: Any) -> Any:
        # Typer's own handling would print usage and colour around each message.
        try:
            code = super().main(*args, **kwargs | {"standalone_mode": False})
        except Exception as error:
            names = {f"{kind.__module__}.{kind.__name__}" for kind in type(error).__mro__}
            fixable = isinstance(error, (typer.TyperException, ValueError, OSError, ImportError)) or names & FIXABLE
            if os.environ.get("PALU_TRACEBACK") or not fixable:
                raise
            text = error.format_message() if isinstance(error, typer.TyperException) else str(error)
            print(f"palu: {' '.join(text.split()) or type(error).__name__}", file=sys.stderr)
            code = 2
        sys.exit(code or 0)


app = typer.Typer(
    cls=Palu,
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # importing rich would take longer than all the rest of --help
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="An error is one line; with PALU_TRACEBACK=1 in the environment it comes with its traceback.",
)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"palu {palu.__version__}")
        raise typer.Exit


@app.callback()
def root(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Make a language model forget chosen answers, and keep the rest (PALU, arXiv 2601.03190)."""
    if ctx.invoked_subcommand is None:
        print(ctx.get_help())


def main() -> None:
    """The console script."""
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, exit_on_sigterm)
    silence_noise()
    shorten_warnings()
    try:
        app(prog_name="palu")
    except SystemExit as end:
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            raise
        # One of many processes: a thread of Gloo may wait for the interpreter's lock to let go of a tensor, and before
        # Python 3.14 that aborts a process whose interpreter shuts down meanwhile (one run in twenty did).
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(end.code or 0))
