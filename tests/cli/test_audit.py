"""``palu audit``, on planted models in folders."""

from __future__ import annotations

import copy
import json
import re
import stat
from pathlib import Path
from typing import Any

import pytest
from helpers.command import palu_command, write_input
from helpers.planted import FORGET, RETAIN, never_saw, original, tokenizer
from transformers import AutoModelForCausalLM
from typer.testing import Result

import palu

RUN = palu.UnlearnConfig(epochs=1, lambda_retain=1.0, neighbours=0, variants=0, progress=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models with their tokenizer, forget.jsonl and retain.jsonl; tests write elsewhere."""
    return write_input(tmp_path_factory.mktemp("audit"), original(), never_saw())


def command(*arguments: Any) -> Result:
    return palu_command("audit", *arguments)


def arguments(folder: Path, output: Path) -> list[Any]:
    data = ["--forget", folder / "forget.jsonl", "--retain", folder / "retain.jsonl"]
    models = ["--model", folder / "model1", "--original", folder / "model"]
    return [*models, *data, "--output", output, "--quick", "--no-progress"]


def test_a_table_is_printed_and_the_results_are_written(folder: Path, tmp_path: Path) -> None:
    result = command(*arguments(folder, tmp_path / "run"), "--draws", 2, "--seed", 3)
    assert result.exit_code == 0, result.output
    private = tmp_path / "run" / "private"
    assert stat.S_IMODE(private.stat().st_mode) == 0o700
    assert stat.S_IMODE((private / "audit.json").stat().st_mode) == 0o600
    written = json.loads((private / "audit.json").read_text(encoding="utf-8"))
    assert written == palu.audit(
        never_saw(),
        original(),
        FORGET,
        tokenizer=tokenizer(),
        retain=RETAIN,
        quick=True,
        draws=2,
        seed=3,
        progress=False,
    )
    lines = result.stdout.splitlines()
    assert lines[0] == (
        "6 secrets (0 spans left out that their question tells, 0 that are marked twice); "
        "share of them that each attack gets:"
    )
    table = {re.split(r"  +| \(of", line)[0]: line for line in lines[2:]}
    *made, depth = written["attacks"]
    assert depth["name"] == "inside: depth" and "skipped: it needs a retain model" in table[depth["name"]]
    for row in made:
        assert ("(of 1)" in table[row["name"]]) == (row["secrets"] == 1)
        assert re.split("  +", table[row["name"]])[3:5] == ["0.00 (0.00 to 0.00)", "held"], table[row["name"]]
    assert "1 greedy answer of" in table["ask: greedy"]
    assert "2 sampled answers of" in table["sample: leak@1"] and "sampled" not in table["sample: leak@2"]
    assert "utility" in table["quantise: int4"] and "median 1/p" in table["sample: exact p"]
    assert "- without a retain model its share is taken as 0" in result.stdout
    assert "arXiv 2502.15836" in result.stdout
    assert lines[-1] == f"wrote {private / 'audit.json'}, which holds the secrets"
    assert sorted(path.name for path in (tmp_path / "run").rglob("*") if path.parent.name != "audit") == [
        "audit",
        "audit.json",
        "private",
    ]


def test_in_a_run_the_report_and_the_card_are_written_again(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    model = never_saw()
    recorder = palu.Recorder(model, FORGET, RETAIN, tokenizer=tokenizer(), config=RUN)
    result = palu.unlearn(copy.deepcopy(model), None, FORGET, RETAIN, tokenizer=tokenizer(), config=RUN)
    palu.save_run(output, result, tokenizer(), recorder)
    report, card = output / "private" / "report.html", output / "model" / "README.md"
    before = report.read_text(encoding="utf-8")
    assert "What an attacker gets out" not in before
    (output / "private" / "history.jsonl").rename(tmp_path / "history.jsonl")
    given = [*arguments(folder, output), "--model", output / "model", "--only", "ask"]
    refused = command(*given)
    assert refused.exit_code == 2 and not refused.stdout  # before a model is attacked for hours
    assert "history.jsonl is missing" in refused.stderr and not (output / "private" / "audit.json").exists()

    (tmp_path / "history.jsonl").rename(output / "private" / "history.jsonl")
    done = command(*given)
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[-2:] == [f"wrote {report}", f"wrote {card}"]
    after = report.read_text(encoding="utf-8")
    assert "What an attacker gets out" in after and "Perhaps of another model" not in after
    assert "| ask: greedy | 0.00 | 1.00 |" in card.read_text(encoding="utf-8")


def test_one_model_is_held_at_a_time(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import weakref

    loaded: list[weakref.ref[Any]] = []
    load = AutoModelForCausalLM.from_pretrained

    def loading(*args: Any, **kwargs: Any) -> Any:
        assert all(model() is None for model in loaded)
        model = load(*args, **kwargs)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", loading)
    result = command(*arguments(folder, tmp_path), "--retain-model", folder / "model1", "--only", "ask")
    assert result.exit_code == 0, result.output
    assert len(loaded) == 3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--model", "./nowhere"], "--model ./nowhere: there is no such folder"),
        (["--original", "./nowhere"], "--original ./nowhere: there is no such folder"),
        (["--retain-model", "./nowhere"], "--retain-model ./nowhere: there is no such folder"),
        (["--forget", "no.jsonl"], "--forget no.jsonl: there is no such file"),
        (["--retain", "no.jsonl"], "--retain no.jsonl: there is no such file"),
        (["--draws", "0"], "Invalid value for '--draws': Input should be greater than or equal to 1"),
        (
            ["--chat-template-kwargs", '{"tone": 1}'],
            "chat_template_kwargs = {'tone': 1}: the chat template knows no tone; correct the name or leave it out",
        ),
    ],
)
def test_refused_in_one_line(
    folder: Path, tmp_path: Path, given: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda *args, **kwargs: pytest.fail("a model is loaded")
    )
    result = command(*arguments(folder, tmp_path / "out"), *given)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.splitlines()[-1] == f"palu: {message}"
    assert not (tmp_path / "out").exists()


def test_output_must_be_a_folder_that_can_be_written(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for output, message in (
        (file, f"--output {file}: {file} is a file; give a folder"),
        (
            Path("/proc/x"),
            "--output /proc/x: nothing can be written to /proc (No such file or directory); give another folder",
        ),
    ):
        result = command(*arguments(folder, output))
        assert (result.exit_code, result.stderr) == (2, f"palu: {message}\n")
