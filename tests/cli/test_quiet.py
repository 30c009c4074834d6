"""What stands on stderr is palu's: other libraries' noise is left out by name, and nothing else of theirs."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.command import write_input

from palu import quiet

ROOT = Path(__file__).parents[2]
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
    ]
    done = subprocess.run(
        [sys.executable, "-c", RUN, *commands],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    others = [line for line in done.stderr.splitlines() if not line.startswith("palu: ")]
    assert others == []
    assert "wrote out/private/report.html" in done.stdout


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
