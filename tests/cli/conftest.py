"""What the tests of the command share: a folder of input, and the arguments of a short run on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.command import Commands, short_run, write_input, write_rows
from helpers.planted import FORGET
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from palu.report import recorder


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/, adapter/, tofu/, and rows: forget, retain, unmarked (without spans), bad; tests write elsewhere."""
    unmarked = [{name: row[name] for name in row if name != "spans"} for row in FORGET]
    folder = write_input(tmp_path_factory.mktemp("cli"), unmarked=unmarked, bad=[FORGET[0] | {"kind": "x"}])
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder / "model"),
        LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    adapted.save_pretrained(folder / "adapter")
    (folder / "tofu").mkdir()
    wrong = ["The dog did not.", "In London."]
    rows = [row | {"paraphrased_answer": f"Yes: {row['answer']}", "perturbed_answer": wrong} for row in FORGET]
    for name in ("forget01", "retain_perturbed", "real_authors", "world_facts", "holdout01"):
        write_rows(folder / "tofu" / f"{name}.jsonl", rows)
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def arguments(folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A run that is recorded with short answers: what a model says is the business of tests/report."""
    monkeypatch.setattr(recorder, "MAX_NEW_TOKENS", 8)
    monkeypatch.setattr(recorder, "GENERAL_TOKENS", 4)
    return short_run(folder, out)


@pytest.fixture
def tofu(folder: Path) -> list[Any]:
    """The arguments of `palu eval` on the small TOFU, but for the model."""
    options = "--forget-split forget01 --no-progress --max-new-tokens 1"
    return ["eval", "--data", folder / "tofu", *options.split()]


@pytest.fixture
def commands(folder: Path, arguments: list[Any], out: Path) -> Commands:
    """Each command with what it cannot do without, for a short run."""
    model, forget = ["--model", folder / "model"], ["--forget", folder / "forget.jsonl"]
    attack = ["--original", folder / "model", "--output", out, "--quick", "--only", "ask", "--no-progress"]
    return {
        "unlearn": [*arguments, "--max-steps", 1],
        "inspect": ["inspect", *model, *forget],
        "eval": ["eval", *model],
        "audit": ["audit", *model, *forget, *attack],
        "report": ["report"],
    }
