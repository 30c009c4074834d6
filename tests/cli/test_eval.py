"""``palu eval`` on the benchmarks, and one's own questions within ``palu unlearn``."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from helpers.benchmark_data import small_muse_news
from helpers.command import done, read, read_rows, write_rows
from helpers.planted import FORGET, RETAIN, tokenizer
from helpers.tiny import same_weights, weights
from transformers import AutoModelForCausalLM

import palu
from palu.report.plots import number


def test_tofu(folder: Path, tofu: list[Any], tmp_path: Path) -> None:
    common = [*tofu, "--model", folder / "model", "--max-new-tokens", 4]
    retain, output = tmp_path / "retain.json", tmp_path / "results.json"
    result = done(*common, "--output", retain)
    assert re.search(r"forget_quality +no retain_results were given", " ".join(result.stdout.split()))
    options = ["--retain-results", retain, "--language", "de"]
    result = done(*common, *options, "--output", output)
    assert re.search(r"forget_quality +1\b", result.stdout)
    assert re.search(r"forget_empty +(\S+) +\1\b", result.stdout)  # the retain model is the same
    assert result.stdout.endswith(f"wrote {output}\n")
    results = read(output)
    assert results["forget_quality"]["agg_value"] == 1
    assert results["palu"]["split"] == "forget01" and results["palu"]["word_list"].endswith(", de")
    assert results["exact_memorization"]["agg_value"] == read(retain)["exact_memorization"]["agg_value"]


def test_muse_news(folder: Path, tmp_path: Path) -> None:
    for name, rows in small_muse_news().items():
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    output = tmp_path / "results.json"
    common = ["eval", "--model", folder / "model", "--benchmark", "muse-news", "--data", tmp_path, "--no-progress"]
    common += ["--language", "none"]
    result = done(*common, "--output", output)
    assert result.stdout.endswith(f"wrote {output}\n") and re.search(r"forget_verbmem_ROUGE +\d", result.stdout)
    results = read(output)
    assert results["palu"]["benchmark"] == "MUSE-News" and len(results["forget_verbmem_ROUGE"]["value_by_index"]) == 4
    done(*common, "--retain-results", output, "--output", tmp_path / "again.json")
    assert read(tmp_path / "again.json")["privleak"]["agg_value"] == 0


def test_the_history_has_the_means_of_own_questions(
    folder: Path, arguments: list[Any], out: Path, tmp_path: Path
) -> None:
    """Before step 1, at steps 2 and 3 of three; they are what `palu eval --rows` finds, and training is as without."""
    rows = write_rows(tmp_path / "mine.jsonl", [FORGET[0], RETAIN[0]])
    arguments += ["--max-steps", 3, "--probability-floor", 0]  # else the run ends by itself
    done(*arguments, "--eval-rows", rows, "--eval-steps", 2)
    lines = read_rows(out / "private" / "history.jsonl")
    found = [{k: v for k, v in line.items() if k.startswith("eval_")} for line in lines]
    assert [bool(one) for one in found] == [False, True, True]
    before = read(out / "private" / "summary.json")["evaluation_before"]
    for path, metrics in ((folder / "model", before), (out / "model", found[2])):
        model = AutoModelForCausalLM.from_pretrained(path)
        alone = palu.evaluate.questions(model, tokenizer(), str(rows), progress=False)
        means = {f"eval_{name}": entry["agg_value"] for name, entry in alone.items() if name != "palu"}
        assert metrics == pytest.approx({name: value for name, value in means.items() if value is not None})
    name = "eval_retain_Q_A_Prob"
    assert {"eval_forget_told", name} <= before.keys() and before[name] != found[2][name]
    report = (out / "private" / "report.html").read_text(encoding="utf-8")
    assert f"{number(before[name])} → {number(found[2][name])}" in report
    assert f"{name}: {number(before[name])} at step 0" in report

    done(*arguments, "--output", tmp_path / "plain")
    assert same_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "plain" / "model"), weights(model))
