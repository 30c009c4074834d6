"""The ``palu`` command itself: help, completion, exit status and signals, and that nothing but palu's is on stderr."""

from __future__ import annotations

import importlib
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.command import FORGET, palu_command, write_input
from transformers import AutoTokenizer

import palu
from palu import quiet
from palu.cli import FIXABLE
from palu.config import UnlearnConfig
from palu.methods import METHODS

ROOT = Path(__file__).parents[2]


def start(*arguments: Any, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python on this palu."""
    environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=os.environ | environment)


def test_help_imports_nothing_slow() -> None:
    code = """
import sys
from palu.cli import app
for command in ([], ["inspect"], ["eval"], ["audit"], ["report"], ["push"], ["doctor"]):
    try:
        app([*command, "--help"], prog_name="palu")
    except SystemExit as end:
        assert not end.code
slow = {"torch", "transformers", "accelerate", "numpy", "rich", "yaml", "tokenizers"} & sys.modules.keys()
assert not slow, slow
"""
    said = start("-c", code)
    assert said.returncode == 0, said.stderr
    for command in ("", " inspect", " eval", " audit", " report", " push", " doctor"):
        assert f"Usage: palu{command} [OPTIONS]" in said.stdout


def test_every_setting_is_a_flag_with_its_help() -> None:
    result = palu_command("unlearn", "--help")
    assert result.exit_code == 0
    said = " ".join(result.output.split())
    settings = {name for kind in METHODS.values() for name in UnlearnConfig(kind).values()}
    for name in settings:
        flag = f"--{name.replace('_', '-')}"
        assert re.search(rf"{flag} (<|/ --no-)", said), flag
    assert "first n tokens of each span are acted on (the paper's is 3); -1: the whole span. [default: -1]" in said
    assert "--objective <palu|ga|gd|dpo|npo|simnpo|tpo|satimp|undial>" in said
    assert "[default: (logs in OUTPUT/private)]" in said
    assert "``" not in said
    assert ":mod:" not in said


def test_without_a_command_the_help_is_shown() -> None:
    assert palu_command().stdout == palu_command("--help").stdout
    assert palu_command("--version").stdout == f"palu {palu.__version__}\n"


def test_completion() -> None:
    for words, found in (("palu un", "unlearn"), ("palu unlearn --kl-direction r", "reverse")):
        places = {"COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1), "_PALU_COMPLETE": "complete_bash"}
        assert palu_command(**places).stdout.split() == [found]


def test_python_m() -> None:
    done = start("-m", "palu", "nothing")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "palu: No such command 'nothing'.\n")


@pytest.mark.parametrize("processes", [1, 2])
def test_how_a_process_ends(processes: int) -> None:
    """One of many without the interpreter's shutdown, which aborts, now and then, while Gloo's threads hold tensors;
    what was said and the exit status stay. SIGTERM ends every command as Ctrl-C does: what is open is closed."""
    code = "import atexit, palu.cli; atexit.register(print, 'shut down'); palu.cli.main()"
    terminated = """
import os, signal, palu.cli
def command(**_):
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("not reached")
    finally:
        print("closed", flush=True)
palu.cli.app = command
palu.cli.main()
"""
    end = "shut down\n" if processes == 1 else ""
    for arguments, told in (
        ([code, "--version"], (0, f"palu {palu.__version__}\n{end}", "")),
        ([code, "x"], (2, end, "palu: No such command 'x'.\n")),
        ([terminated], (143, "closed\n", "")),
    ):
        done = start("-c", *arguments, WORLD_SIZE=str(processes))
        assert (done.returncode, done.stdout, done.stderr) == told


def test_an_error_with_its_traceback(arguments: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """On demand, and of a bug always."""
    monkeypatch.setenv("PALU_TRACEBACK", "1")
    assert isinstance(palu_command(*arguments, "--n", 0).exception, ValueError)
    monkeypatch.delenv("PALU_TRACEBACK")

    def bug(*_: Any, **__: Any) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", bug)
    assert isinstance(palu_command(*arguments).exception, KeyError)


def test_errors_that_are_one_line_are_there() -> None:
    for name in FIXABLE:
        module, kind = name.rsplit(".", 1)
        found = getattr(importlib.import_module(module), kind)
        assert f"{found.__module__}.{found.__name__}" == name


# --- other libraries' noise is left out by name, and nothing else of theirs ---
# Commands one after the other, since each would import all again.
RUN = """
import sys
from palu.cli import main
for command in sys.argv[1:]:
    sys.argv = ["palu", *command.split()]
    try:
        main()
    except SystemExit as end:
        assert not end.code, command
"""


def test_commands_say_nothing_of_other_libraries(tmp_path: Path) -> None:
    write_input(tmp_path)
    sampling = tmp_path / "model" / "generation_config.json"  # flags that are not valid, as many models have them
    sampling.write_text(json.dumps({"do_sample": False, "temperature": 0.6, "top_p": 0.9}), encoding="utf-8")
    data = "--forget forget.jsonl --retain retain.jsonl"
    commands = [
        "doctor",
        "inspect --model model --forget forget.jsonl",
        f"unlearn --model model {data} --output out --lora --max-steps 1 --anchors 0 --neighbours 0 --variants 0 "
        "--no-progress",
        "eval --model out/model --rows forget.jsonl --max-new-tokens 1 --no-progress",
        f"audit --model out/model {data} --original model --output out --quick --only ask --max-new-tokens 1 "
        "--no-progress",
        "report out",
        "push out me/out",
    ]
    done = start("-c", RUN, *commands, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    others = [line for line in done.stderr.splitlines() if not line.startswith("palu: ")]
    assert others == []
    assert "wrote out/private/report.html" in done.stdout


def test_a_warning_is_one_line_where_it_is_of_palu(tmp_path: Path) -> None:
    write_input(tmp_path, forget=[*FORGET, FORGET[0] | {"spans": []}])
    done = start("-m", "palu", "inspect", "--model", "model", "--forget", "forget.jsonl", cwd=tmp_path)
    (line,) = [line for line in done.stderr.splitlines() if "no token" in line]
    assert line.startswith(f"palu: warning: forget set: no token is to be forgotten in 1 row ({len(FORGET)}), so ")
    assert "examples.py" not in done.stderr
    theirs = "import warnings, palu.quiet; palu.quiet.shorten_warnings(); warnings.warn('look out')"
    assert start("-c", theirs).stderr.startswith("<string>:1: UserWarning: look out\n")


@pytest.mark.parametrize("name", quiet.NOISE)
def test_other_messages_of_the_same_loggers_are_there(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    logger, handler = logging.getLogger(name), logging.Handler()
    records: list[logging.LogRecord] = []
    monkeypatch.setattr(handler, "emit", records.append)
    monkeypatch.setattr(logger, "handlers", [handler])
    monkeypatch.setattr(logger, "filters", [])
    monkeypatch.setattr(logger, "disabled", False)
    quiet.silence_noise()
    for text in (f"x {quiet.NOISE[name]} y", "your model is broken"):  # whatever level another test has left
        logger.handle(logger.makeRecord(name, logging.WARNING, __file__, 0, text, (), None))
    assert [record.getMessage() for record in records] == ["your model is broken"]
