"""``palu eval`` on the benchmarks, one's own questions within ``palu unlearn``, and ``palu audit``."""

from __future__ import annotations

import json
import re
import stat
from pathlib import Path
from typing import Any

import pytest
from helpers.benchmark_data import small_muse
from helpers.command import done, one_model_at_a_time, palu_command, read, read_rows, refusal, write_input, write_rows
from helpers.planted import FORGET, RETAIN, never_saw, original, tokenizer
from helpers.tiny import same_weights, weights
from transformers import AutoModelForCausalLM

import palu
from palu.report import audited
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


def test_muse_books(folder: Path, tmp_path: Path) -> None:
    for name, rows in small_muse().items():
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    output = tmp_path / "results.json"
    common = ["eval", "--model", folder / "model", "--benchmark", "muse-books", "--data", tmp_path, "--no-progress"]
    common += ["--language", "none"]
    result = done(*common, "--output", output)
    assert result.stdout.endswith(f"wrote {output}\n") and re.search(r"forget_verbmem_ROUGE +\d", result.stdout)
    results = read(output)
    assert results["palu"]["benchmark"] == "MUSE-Books" and len(results["forget_verbmem_ROUGE"]["value_by_index"]) == 4
    done(*common, "--retain-results", output, "--output", tmp_path / "again.json")
    assert read(tmp_path / "again.json")["privleak"]["agg_value"] == 0


def test_an_adapter_in_lm_eval(folder: Path, tmp_path: Path) -> None:
    model, adapter, tasks = folder / "model", folder / "adapter", tmp_path / "my tasks"
    given = ["--rows", folder / "retain.jsonl", "--tokenizer", model, "--write-lm-eval", tasks]
    command = done("eval", "--model", adapter, *given).stdout.splitlines()[-1]
    assert f" --model_args pretrained={model},peft={adapter},tokenizer={model},add_bos_token=False," in command
    assert command.endswith(f" --include_path '{tasks}' --tasks palu_questions")


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


# --- palu audit ---
@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models with their tokenizer, forget.jsonl and retain.jsonl; tests write elsewhere."""
    return write_input(tmp_path_factory.mktemp("audit"), original(), never_saw())


def data(planted: Path, output: Path) -> list[Any]:
    rows = ["--forget", planted / "forget.jsonl", "--retain", planted / "retain.jsonl"]
    return ["--model", planted / "model1", *rows, "--output", output, "--no-progress"]


def given(planted: Path, output: Path) -> list[Any]:
    return ["audit", *data(planted, output), "--original", planted / "model", "--quick"]


def test_a_table_is_printed_and_the_results_are_written(planted: Path, tmp_path: Path) -> None:
    only = ["ask", "sample", "exact-probability", "quantise-int4", "inside-depth"]
    options = [word for name in only for word in ("--only", name)]
    result = done(*given(planted, tmp_path / "run"), "--draws", 2, "--seed", 3, *options)
    private = tmp_path / "run" / "private"
    assert stat.S_IMODE(private.stat().st_mode) == 0o700
    assert stat.S_IMODE((private / "audit.json").stat().st_mode) == 0o600
    written = read(private / "audit.json")
    assert written == palu.audit(
        never_saw(),
        original(),
        FORGET,
        tokenizer=tokenizer(),
        retain=RETAIN,
        quick=True,
        draws=2,
        seed=3,
        only=only,
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
    for row, shown in zip(made, audited.rows(written), strict=False):
        assert ("(of 1)" in table[row["name"]]) == (row["secrets"] == 1)
        assert all(cell in table[row["name"]] for cell in (shown["rho"], shown["verdict"])), (shown, table)
    assert re.split("  +", table["ask: greedy"])[1:5] == ["0.00", "1.00", "0.00 (0.00 to 0.00)", "held"]
    assert "1 greedy answer of" in table["ask: greedy"]
    assert "2 sampled answers of" in table["sample: leak@1"] and "sampled" not in table["sample: leak@2"]
    assert "utility" in table["quantise: int4"] and "median 1/p" in table["sample: exact p"]
    assert f"\n{audited.MEANING}\n- only some attacks were made: " in result.stdout
    assert "\n- without a retain model its share is taken as 0" in result.stdout
    assert "arXiv 2502.15836" in result.stdout
    assert lines[-1] == f"wrote {private / 'audit.json'}, which holds the secrets"
    assert sorted(path.name for path in (tmp_path / "run").rglob("*") if path.parent.name != "audit") == [
        "audit",
        "audit.json",
        "private",
    ]


def test_in_a_run_the_report_and_the_card_are_written_again(planted: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    short = "--epochs 1 --anchors 0 --neighbours 0 --variants 0"
    done("unlearn", *data(planted, output), *short.split())
    report, card = output / "private" / "report.html", output / "model" / "README.md"
    before = report.read_text(encoding="utf-8")
    assert "What an attacker gets out" not in before
    (output / "private" / "history.jsonl").rename(tmp_path / "history.jsonl")
    asked = [*given(planted, output), "--model", output / "model", "--only", "ask"]
    assert "history.jsonl is missing" in refusal(palu_command(*asked)), "before a model is attacked for hours"
    assert not (output / "private" / "audit.json").exists()

    (tmp_path / "history.jsonl").rename(output / "private" / "history.jsonl")
    results = {"privleak": {"agg_value": -12.5}}  # which is not in the card yet
    (output / "private" / "evaluation-mine.json").write_text(json.dumps(results), encoding="utf-8")
    assert done(*asked).stdout.splitlines()[-2:] == [f"wrote {report}", f"wrote {card}"]
    after = report.read_text(encoding="utf-8")
    assert "What an attacker gets out" in after and "Perhaps of another model" not in after
    own = card.read_text(encoding="utf-8")
    assert "| ask: greedy | 0.00 | 1.00 |" in own and "PrivLeak" in own
    own = own.replace("# Unlearned", "# My own Llama, unlearned")
    card.write_text(own, encoding="utf-8")
    left = f"{card} was edited and is left as it is; palu.write_card makes it again"
    printed = done(*asked).stdout.splitlines()
    assert printed[-2:] == [f"wrote {report}", left]
    assert printed[-3].endswith("audit.json, which holds the secrets; an earlier audit is gone")
    assert card.read_text(encoding="utf-8") == own


def test_one_model_is_held_at_a_time(planted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = one_model_at_a_time(monkeypatch)
    done(*given(planted, tmp_path), "--retain-model", planted / "model1", "--only", "ask")
    assert len(loaded) == 3
