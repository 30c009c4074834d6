"""The ``palu`` command in this process, and the folders that it is given."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
from helpers.planted import FORGET, RETAIN, tokenizer
from helpers.tiny import tiny_llama
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

from palu.cli import app

Commands = dict[str, list[Any]]


def palu_command(*arguments: Any, **environment: str) -> Result:
    environment = {"COLUMNS": "200"} | environment
    return CliRunner().invoke(app, list(map(str, arguments)), prog_name="palu", env=environment)


def done(*arguments: Any) -> Result:
    """A command that succeeds."""
    result = palu_command(*arguments)
    assert result.exit_code == 0, f"{result.output}{result.exception!r}"
    return result


def refusal(result: Result) -> str:
    """What is said where the user has to fix something: one line, on stderr, and exit status 2."""
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("palu: ")]
    assert result.stderr.endswith(f"{line}\n") and "Traceback" not in result.stderr
    return line.removeprefix("palu: ")


def short_run(folder: Path, output: Path) -> list[Any]:
    """What `palu unlearn` cannot do without, and settings of six steps; an option that is given again wins."""
    data = ["--forget", folder / "forget.jsonl", "--retain", folder / "retain.jsonl", "--output", output]
    settings = "--batch-size 2 --epochs 2 --learning-rate 0.01 --anchors 0 --neighbours 0 --variants 0 --no-progress"
    return ["unlearn", "--model", folder / "model", *data, *settings.split()]


def one_model_at_a_time(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Have the loading of a model fail while an earlier one is held; return weak references to those loaded."""
    loaded: list[weakref.ref[Any]] = []
    load = AutoModelForCausalLM.from_pretrained

    def loading(*args: Any, **kwargs: Any) -> Any:
        assert all(model() is None for model in loaded)
        model = load(*args, **kwargs)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", loading)
    return loaded


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def write_input(folder: Path, *models: Any, tokens: Any = None, **sets: list[dict[str, Any]]) -> Path:
    """Write model/ (and model1/, ... of further models), each with a tokenizer, and forget.jsonl and retain.jsonl."""
    tokens = tokenizer() if tokens is None else tokens
    for number, model in enumerate(models or [tiny_llama(vocab_size=len(tokens), max_position_embeddings=512)]):
        for part in (model, tokens):
            part.save_pretrained(folder / f"model{number or ''}")
    for name, rows in ({"forget": FORGET, "retain": RETAIN} | sets).items():
        write_rows(folder / f"{name}.jsonl", rows)
    return folder
