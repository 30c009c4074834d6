"""``palu unlearn --eval-rows``: one's own questions, asked within the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.command import palu_command, write_input
from helpers.planted import FORGET, RETAIN, tokenizer
from helpers.tiny import same_weights, weights
from transformers import AutoModelForCausalLM
from typer.testing import Result

import palu
from palu.report.plots import number


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/, forget.jsonl, retain.jsonl and mine.jsonl; tests write elsewhere."""
    mine, bad = [FORGET[0], RETAIN[0]], [FORGET[0] | {"kind": "x"}]
    return write_input(tmp_path_factory.mktemp("rows"), mine=mine, bad=bad)


def unlearn(folder: Path, output: Path, *more: Any) -> Result:
    data = ["--forget", folder / "forget.jsonl", "--retain", folder / "retain.jsonl", "--output", output]
    settings = ["--max-steps", 3, "--learning-rate", 0.01, "--no-progress"]
    return palu_command("unlearn", "--model", folder / "model", *data, *settings, *more)


ENDLESS = ["--probability-floor", 0]  # else the run ends by itself


def test_the_history_has_their_means(folder: Path, tmp_path: Path) -> None:
    """Before step 1, at steps 2 and 3 of three; they are what `palu eval --rows` finds, and training is as without."""
    rows = folder / "mine.jsonl"
    result = unlearn(folder, tmp_path / "out", "--eval-rows", rows, "--eval-steps", 2, *ENDLESS)
    assert result.exit_code == 0, result.output
    lines = (tmp_path / "out" / "private" / "history.jsonl").read_text(encoding="utf-8").splitlines()
    found = [{k: v for k, v in json.loads(line).items() if k.startswith("eval_")} for line in lines]
    assert [bool(one) for one in found] == [False, True, True]
    before = json.loads((tmp_path / "out" / "private" / "summary.json").read_text())["evaluation_before"]
    for path, metrics in ((folder / "model", before), (tmp_path / "out" / "model", found[2])):
        model = AutoModelForCausalLM.from_pretrained(path)
        alone = palu.evaluate.questions(model, tokenizer(), str(rows), progress=False)
        means = {f"eval_{name}": entry["agg_value"] for name, entry in alone.items() if name != "palu"}
        assert metrics == pytest.approx({name: value for name, value in means.items() if value is not None})
    name = "eval_retain_Q_A_Prob"
    assert {"eval_forget_told", name} <= before.keys() and before[name] != found[2][name]
    report = (tmp_path / "out" / "private" / "report.html").read_text(encoding="utf-8")
    assert (
        f"{number(before[name])} → {number(found[2][name])}" in report
        and f"{name}: {number(before[name])} at step 0" in report
    )

    assert unlearn(folder, tmp_path / "plain", *ENDLESS).exit_code == 0
    assert same_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "plain" / "model"), weights(model))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--eval-steps", 2], "palu: --eval-steps 2: there is nothing to evaluate; add --eval-rows"),
        (["--eval-rows", "absent.jsonl"], "palu: there is no file absent.jsonl"),
        (["--eval-rows", "{folder}/bad.jsonl"], "palu: evaluation row 0 (line 1): column 'kind' is 'x'; give forget"),
    ],
)
def test_what_is_wrong_is_said_first(
    options: list[Any], told: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **k: pytest.fail("a model is loaded"))
    result = unlearn(folder, tmp_path / "out", *(str(option).format(folder=folder) for option in options))
    assert result.exit_code == 2, result.output
    assert told in result.stderr
    assert not (tmp_path / "out").exists()
