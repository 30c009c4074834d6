"""What the tables of benchmarks/ choose, keep and leave out. That they run is CI's business: they need a real model."""

import json
import shutil
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import _cross
import _methods
import _models
import _tofu
import bench_audit
import bench_muse_news
import bench_spans
import bench_tofu
import pytest
import torch
from _stages import Stages
from helpers.small_tokenizers import CHATML, byte_level
from helpers.tiny import tiny_llama

from palu import UnlearnConfig
from palu.evaluate.summarize import UTILITY

SHARED = Path(__file__).parents[3] / "shared" / "data"

has_tofu = pytest.mark.skipif(not (SHARED / "tofu").exists(), reason="TOFU is not in ../shared")
has_muse = pytest.mark.skipif(not (SHARED / "muse_news").exists(), reason="MUSE-News is not in ../shared")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """One precision, and nothing that the model would first have to write; both are tested elsewhere."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    for settings in (_methods.METHODS["palu"], bench_muse_news.METHODS["palu-whole-texts"]):
        for name in ("anchors", "neighbours", "variants"):
            monkeypatch.setitem(settings, name, 0)


# --- Stages ---
def test_a_finished_stage_is_not_done_again_and_other_settings_are_refused(tmp_path: Path) -> None:
    calls = []

    def make() -> dict:
        calls.append(1)
        return {"value": 0.1}

    for _ in range(2):
        assert Stages(tmp_path, {"preset": "tiny"}).results("one", make) == {"value": 0.1}
    assert calls == [1]
    with pytest.raises(SystemExit, match=r"holds the stages of other settings.*another --output"):
        Stages(tmp_path, {"preset": "standard"})


# --- The TOFU table ---
def run(method: str, fq: float, mu: float, lr: float | None = None, seed: int = 0) -> dict:
    figures = dict.fromkeys(_tofu.COLUMNS.values(), 0.5) | {"forget_quality": fq, "model_utility": mu}
    setting = {} if lr is None else {"learning_rate": lr, "seed": seed}
    return {"method": method} | setting | figures


def test_each_method_shows_its_best_setting_that_keeps_the_utility() -> None:
    rows = [
        run("original", 1e-9, 0.40),
        run("palu", 0.9, 0.30, 1e-5),  # forgets best, but loses too much
        run("palu", 0.2, 0.39, 2e-5, 0),
        run("palu", 0.4, 0.39, 2e-5, 1),
        run("palu", 0.1, 0.40, 5e-5),
        run("npo", 0.9, 0.10, 1e-5),  # no setting keeps it: the highest utility is shown, and told apart
        run("npo", 0.1, 0.20, 2e-5),
    ]
    original, palu, npo = bench_tofu.chosen(rows, utility=0.40)
    assert original["method"] == "original"
    assert (palu["learning_rate"], palu["seeds"]) == (2e-5, 2)
    assert palu["forget_quality"] == pytest.approx(0.3)
    assert npo["learning_rate"] == 2e-5
    lines = bench_tofu.markdown([original, npo, palu], utility=0.40).splitlines()
    assert lines[2].startswith("| Original |  | 1e-09 | 0.5 | 0.4 |")
    assert lines[3].startswith("| NPO * | 2e-05 | 0.1 |")
    assert lines[4].startswith("| PALU | 2e-05 | 0.3 |")


def test_a_method_with_its_own_rate_is_in_the_table() -> None:
    row = {"method": "palu", "learning_rate": _tofu.read_rate("own"), "model_utility": 0.5}
    table = _tofu.markdown([dict.fromkeys(_tofu.COLUMNS.values()) | row], utility=0.5)
    assert table.splitlines()[-1].startswith("| PALU | own |")
    assert [_tofu.rate_text(_tofu.read_rate(text)) for text in ("own", "5e-05")] == ["own", "5e-05"]


def test_a_figure_that_is_missing_stays_missing() -> None:
    rows = [run("original", 1e-9, 0.4), run("npo", 0.1, 0.4, 1e-5) | {"privleak": None}]
    row = bench_tofu.chosen(rows, utility=0.4)[1]
    assert row["privleak"] is None
    assert "|  |" in bench_tofu.markdown([row], utility=0.4)

    older = {"forget_quality": {"agg_value": 0.1}, "cost": {"seconds": 2.0}}  # a stage from before a metric was there
    row = bench_tofu.summary(older, method="npo")
    assert row["forget_quality"] == 0.1 and row["seconds"] == 2.0 and row["forget_no_word"] is None


@has_tofu
@pytest.mark.parametrize(
    ("preset", "forget_set", "forget", "retain"),
    [("standard", f"forget{number:02d}", 40 * number, 3960 - 40 * number) for number in (1, 5, 10)]
    + [("tiny", "forget05", 20, 20)],
)
def test_no_model_sees_the_holdout(preset: str, forget_set: str, forget: int, retain: int) -> None:
    data = _tofu.load_data(SHARED / "tofu", _tofu.PRESETS[preset], forget_set)
    assert (len(data.forget), len(data.retain)) == (forget, retain)

    def facts(rows: list[dict]) -> set[tuple[str, str]]:
        return {(row["question"], row["answer"]) for row in rows}

    taught = facts(data.forget + data.retain)
    assert len(taught) == len(data.forget) + len(data.retain)
    assert taught.isdisjoint(facts(data.evaluated.holdout))
    assert facts(data.evaluated.forget) == facts(data.forget)
    assert facts(data.evaluated.retain) <= facts(data.retain)


# --- MUSE-News ---
def test_spans_are_names_and_numbers() -> None:
    text = 'At 14:00 the mayor, Jamie Sansom, paid £55,000 to Tewkesbury Academy. He left. "It rained," I said in Rome.'
    assert [text[start:end] for start, end in bench_muse_news.spans_of(text)] == [
        "14:00",
        "Jamie Sansom",
        "£55,000",
        "Tewkesbury Academy",
        "Rome",
    ]
    start = "Jamie Sansom was there"
    assert [start[a:b] for a, b in bench_muse_news.spans_of(start)] == ["Sansom"]


# --- Spans ---
def test_the_agreement_of_spans_counts_tokens() -> None:
    tokenizer, answer = byte_level(CHATML, bos=False), "0123456789"
    assert tokenizer.tokenize(answer) == list(answer)
    rows = [{"question": "Who?", "answer": answer, "spans": place} for place in ([[0, 5]], [[3, 9]])]
    result = bench_spans.agreement(rows[:1], rows[1:], tokenizer)
    # Of five found, two are among the six marked; of the first three found, none.
    assert result == {"precision": 0.4, "recall": 0.333, "F1": 0.364, "onset_precision": 0.0, "spans": 1}
    assert bench_spans.agreement(rows[1:], rows[:1], tokenizer)["onset_precision"] == 0.667
    assert bench_spans.agreement(rows, rows, tokenizer)["F1"] == 1


# --- The commands, from models to results, with a Llama that knows nothing ---
SIZES = _tofu.Preset(4, 5, 2, 2, 2, 4, 1, 4, 1e-4, 1, 4, (1e-3,), (0,), 3)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = byte_level(CHATML)
    tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=4096).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model_folder: str) -> Callable[[ModuleType, str], dict]:
    """Runs a benchmark's command on the Llama; what it wrote to its one JSON file."""
    standard = replace(SIZES, learning_rates=(1e-3, 2e-3))
    cross = replace(SIZES, teach_batch=10, batch_size=10)
    for name, sizes in {"tiny": SIZES, "standard": standard, "cross": cross}.items():
        monkeypatch.setitem(_tofu.PRESETS, name, sizes)
    monkeypatch.setattr(_tofu, "AUDIT_TOKENS", 3)
    folders = ["--model", model_folder, "--output", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]

    def call(module: ModuleType, options: str) -> dict:
        monkeypatch.setattr(sys, "argv", [module.__name__, *folders, *options.split()])
        module.main()
        (written,) = (tmp_path / "results").glob("*.json")
        return json.loads(written.read_text())

    return call


@has_tofu
def test_the_table_and_the_claims_run(command: Callable, tmp_path: Path) -> None:
    record, methods = command(bench_tofu, "--preset tiny"), [*_methods.OBJECTIVE_METHODS, "palu-paper"]
    assert [row["method"] for row in record["table"]] == ["original", "retain", *methods]
    assert len(record["runs"]) == len(record["table"])
    for row in record["runs"]:
        value, low, high = row["utility"].pop("model_utility")
        assert low <= value <= high and value == pytest.approx(row["model_utility"], rel=1e-12)
        assert list(row["utility"]) == [*UTILITY] and all(one[1] <= one[0] <= one[2] for one in row["utility"].values())
    for row in record["table"]:
        missing = {*_tofu.ATTACKS.values()} | ({"seconds", "peak_gib"} if "seeds" not in row else set())
        missing |= {"forget_quality", "forget_quality_ks"} if row["method"] == "retain" else set()
        assert {name for name in _tofu.COLUMNS.values() if row[name] is None} == missing, row["method"]

    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs" / "tiny").rglob("*.gz")}
    record = command(bench_tofu, "--preset tiny --methods palu,palu-paper,paper-N=1,paper-KL=forward")
    assert [row["method"] for row in record["table"][3:]] == ["palu-paper", "paper-N=1", "paper-KL=forward"]
    assert {path: path.stat().st_mtime_ns for path in done} == done, "what the table did is not done again"
    assert (tmp_path / "results" / "tofu_tiny.png").stat().st_size > 10_000


def test_claims_change_one_setting_of_the_paper() -> None:
    paper = UnlearnConfig().replace(**_methods.METHODS["palu-paper"])
    claims = [name for name in _methods.named("claims") if name.startswith("paper-")]
    assert len(claims) == 4 + 4 + 2 + 1
    for name in claims:
        config = UnlearnConfig().replace(**_methods.METHODS[name])
        (changed,) = (field for field, value in vars(config.method).items() if value != getattr(paper.method, field))
        assert config.replace(**{changed: getattr(paper.method, changed)}) == paper


@has_tofu
def test_standard_chooses_a_rate_on_one_forget_set_and_reports_others(command: Callable, tmp_path: Path) -> None:
    record = command(bench_tofu, "--preset standard --methods npo --forget-sets forget01 forget05")
    first, second = record["forget01"], record["forget05"]
    rate = first["table"][-1]["learning_rate"]
    reported = {*product((None, rate), range(3))}
    assert {(row["learning_rate"], row["seed"]) for row in first["runs"][3:]} == reported | {(1e-3, 0), (2e-3, 0)}
    assert {(row["learning_rate"], row["seed"]) for row in second["runs"][3:]} == reported
    for one in (first, second):
        assert [row["method"] for row in one["table"]] == ["original", "retain", "retain, another order", "npo", "npo"]
        assert [(row["learning_rate"], row["seeds"]) for row in one["table"][3:]] == [(None, 3), (rate, 3)]
    for row in [*first["table"], *second["table"]]:
        assert [row[name] is None for name in _tofu.ATTACKS.values()] == [row["method"] == "retain, another order"] * 3
    table = (tmp_path / "results" / "tofu_standard.md").read_text()
    assert (
        table.startswith("forget01\n\n|") and "\n\nforget05\n\n|" in table and "| Retain, another order |  |" in table
    )
    runs = tmp_path / "runs" / "standard"
    models = ["original", "retain", "retain"]  # all forget sets have one original
    assert sorted(path.parent.name for path in runs.rglob("*.safetensors")) == models
    assert not [*runs.rglob("*checkpoint*")]
    record = command(bench_tofu, "--preset standard --methods npo --forget-sets forget05 --learning-rates own")
    assert record["forget05"]["table"] == second["table"][:4]
    options = "--preset standard --methods npo,ga --forget-sets forget05 --learning-rates own"
    npo, ga = command(bench_tofu, f"{options} --evaluate-only")["forget05"]["runs"][2:]
    not_attacked = dict.fromkeys(_tofu.ATTACKS.values())
    assert npo == second["runs"][3] | not_attacked, "of the same stages"
    assert [path.parent.name for path in runs.rglob("*seed*/*.safetensors")] == ["ga-lrown-seed0-model"]
    attacked = next(row for row in command(bench_tofu, options)["forget05"]["runs"] if row["method"] == "ga")
    assert ga == attacked | not_attacked and None not in [attacked[name] for name in not_attacked]
    assert len([*runs.rglob("*.safetensors")]) == len(models), "attacked, the model is deleted"
    evaluations = tmp_path / "evaluations"
    shutil.copytree(runs, evaluations / "standard", ignore=shutil.ignore_patterns(*models, "audits"))
    of_evaluations = command(bench_tofu, f"{options} --evaluate-only --output {evaluations}")["forget05"]
    assert of_evaluations["runs"][2:] == [npo, ga]
    assert not [*evaluations.rglob("*.safetensors")], "where all are evaluated, no model is needed"


@has_tofu
def test_an_interrupted_command_goes_on_to_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model_folder: str
) -> None:
    """In the middle of teaching, and of unlearning; its folder may be moved in between."""
    sizes = replace(SIZES, retain=20, teach_epochs=2, epochs=6)
    monkeypatch.setitem(_tofu.PRESETS, "tiny", sizes)
    monkeypatch.setattr(_models, "CHECKPOINT_MINUTES", 0)
    monkeypatch.setitem(_methods.METHODS, "npo", {"objective": "npo", "checkpoint_steps": 1})

    def bench(folder: str) -> _tofu.Bench:
        return _tofu.Bench(Namespace(preset="tiny", model=model_folder, output=tmp_path / folder, data=SHARED / "tofu"))

    def unlearned(folder: str) -> tuple[list[bytes], dict[str, Any]]:
        made = bench(folder)
        (run,) = bench_tofu.run(made, {"npo": [1e-3]}, [0])[2:]
        run.pop("seconds"), run.pop("peak_gib")
        return [(path / "model.safetensors").read_bytes() for path in (made.folder, made.retain_folder)], run

    step, taken = torch.optim.AdamW.step, 0

    def steps_until(last: float) -> Callable:
        def counted(self: torch.optim.AdamW, *args: Any, **kwargs: Any) -> Any:
            nonlocal taken
            if taken == last:
                raise KeyboardInterrupt
            taken += 1
            return step(self, *args, **kwargs)

        return counted

    monkeypatch.setattr(torch.optim.AdamW, "step", steps_until(float("inf")))
    whole = unlearned("whole")
    steps, taken = taken, 0
    assert steps == 12 + 10 + 6  # of the original (24 rows), the retain model (20) and NPO
    for last in (5, 15, 25):
        monkeypatch.setattr(torch.optim.AdamW, "step", steps_until(last))
        with pytest.raises(KeyboardInterrupt):
            unlearned("parts")
    monkeypatch.setattr(torch.optim.AdamW, "step", steps_until(float("inf")))
    (tmp_path / "parts").rename(tmp_path / "moved")
    parts = unlearned("moved")
    assert taken == steps, "no step is taken twice"
    assert parts == whole


@has_tofu
def test_the_authors_of_cross_are_apart() -> None:
    """From each other, and what is taught from what no model sees; those that are reported from those chosen on."""
    preset = _tofu.PRESETS["cross"]
    numbers = [author for part in _cross.AUTHORS.values() for author in part]
    assert sorted(numbers) == [author for author in range(20) if author != 10]
    seen: set[str] = set()
    for author in range(20):
        data = _tofu.load_author(SHARED / "tofu", preset, author)
        sizes = [len(rows) for rows in vars(data.evaluated).values()]
        assert (len(data.forget), len(data.retain), sizes) == (20, 20, [20, 10, 100, 117, 10])
        own = [row["question"] + row["answer"] for rows in (data.forget, data.retain) for row in rows]
        unseen = {row["question"] + row["answer"] for row in data.evaluated.holdout}
        assert len({*own} - seen) == 40 and unseen.isdisjoint(own) and len(unseen) == 10
        assert {row["question"] + row["answer"] for row in data.evaluated.retain} <= {*own[20:]}
        seen |= {*own}
    tiny = _tofu.load_data(SHARED / "tofu", _tofu.PRESETS["tiny"])
    ten = _tofu.load_author(SHARED / "tofu", preset, 10)
    assert [row["question"] for row in tiny.forget] == [row["question"] for row in ten.forget]


def test_a_rate_is_chosen_by_all_rows_and_by_the_utility_it_keeps() -> None:
    def runs(shift: float, utility: float) -> list[dict]:
        ratios = [0.1 * i for i in range(1, 21)]
        one = {"ratios": [r + shift for r in ratios], "retain_ratios": ratios, "original_utility": 0.5}
        one["language"] = {name: {"unlearned": 0.02, "retain": 0.01} for name in _cross.LANGUAGE.values()}
        return [one | {"model_utility": 0.5 * utility, "forget_quality": q, "mia_min_k": 0.5} for q in (0.2, 0.8)]

    assert _cross.chosen({1e-5: runs(1.0, 1.0), 2e-5: runs(0.3, 0.96), 5e-5: runs(0.0, 0.94)}) == 2e-5
    assert _cross.chosen({1e-5: runs(0.0, 0.80), 2e-5: runs(1.0, 0.90)}) == 2e-5
    found = _cross.pooled(runs(0.0, 0.9))
    assert found["log_ratio_rms"] == 0
    assert found["forget_quality"] == 1 and found["forget_quality_mean"] == 0.5
    assert found["language"]["forget_no_word"] == {"unlearned": 0.02, "retain": 0.01}
    assert found["forget_quality_lowest"] == 0.2 and found["utility_kept"] == pytest.approx(0.9)


def test_secrets_of_all_authors_are_put_together() -> None:
    def audit(unlearned: list, **more: dict) -> dict:
        return {"ask: greedy": {"unlearned": unlearned, "original": [1.0, 1.0], "retain": [0.0, None]}} | more

    only_one = {"onset: 4 in the answer": {"unlearned": [1.0], "original": [1.0], "retain": [0.0]}}
    found = _cross.attacks([audit([1.0, 1.0], **only_one), audit([0.0, 0.0])])
    assert found["ask: greedy"] == {
        "secrets": 2,
        "unlearned": 0.5,
        "original": 1.0,
        "retain": 0.0,
        "rho": [0.5, 0.0, 1.0],
        "verdict": "undecided",
    }
    assert found["onset: 4 in the answer"]["rho"] == [1.0, 1.0, 1.0]


@has_tofu
def test_cross_chooses_on_some_authors_and_reports_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: Callable
) -> None:
    monkeypatch.setattr(_cross, "AUTHORS", {"choose": (0, 1), "report": (4, 5), "fresh": ()})
    given = "--preset cross --methods palu --learning-rates 1e-3 2e-3 --choosing-authors 0 --attacks ask"
    record = command(bench_tofu, given)
    assert record["choosing"]["palu"].keys() == {"0.001", "0.002"}
    assert record["authors"]["choose"] == [0]
    reported = record["reported"]["palu"]
    assert [run["author"] for run in reported["runs"]] == [4, 5]
    assert [len(run["ratios"]) for run in reported["runs"]] == [20, 20]
    assert reported["attacks"]["ask: greedy"]["secrets"] >= 20
    # Two steps on the same rows in another order: another model, and nearly the same one.
    again = record["retain_again"]
    assert len(again["ratios"]) == len(record["retain_ratios"]) == 2
    for ratios, others in zip(again["ratios"], record["retain_ratios"], strict=True):
        assert ratios != others and ratios == pytest.approx(others, rel=0.1)
    assert (tmp_path / "results" / "tofu_cross.md").read_text().count("\n") == 5
    assert (tmp_path / "results" / "tofu_cross.png").stat().st_size > 10_000
    # Weights are kept no longer than they are needed, and nothing is made twice.
    runs = tmp_path / "runs" / "cross"
    assert {path.parent.name for path in runs.rglob("*.safetensors")} == {"original", "retain"}
    monkeypatch.setattr(_tofu.Bench, "_unlearn", lambda *_: pytest.fail("unlearned again"))
    assert command(bench_tofu, given)["reported"] == record["reported"]


@has_tofu
def test_the_audit_attacks_the_models_of_the_table(command: Callable, tmp_path: Path) -> None:
    record = command(bench_audit, "--preset tiny --methods palu,npo --learning-rate 1e-3")
    assert list(record["audits"]) == ["palu", "npo"]
    for audit in record["audits"].values():
        assert audit["models"].keys() == {"unlearned", "original", "retain"}
        assert audit["attacks"]["ask: greedy"].keys() == {"secrets", "rho", "verdict", *audit["models"]}
    assert record["language"]["npo"].keys() == {"unlearned", "original", "retain"}
    originals = [audit["models"]["original"]["fingerprint"] for audit in record["audits"].values()]
    unlearned = [audit["models"]["unlearned"]["fingerprint"] for audit in record["audits"].values()]
    assert len({*originals}) == 1 and len({*originals, *unlearned}) == 3
    table = (tmp_path / "results" / "audit_tiny.md").read_text().splitlines()
    assert table[0] == "| attack (share of secrets told) | original | retain | PALU | NPO |"
    assert len(table) == 4 + len(record["audits"]["palu"]["attacks"]) and len({row.count("|") for row in table}) == 1

    stages = tmp_path / "runs" / "tiny" / "forget05"
    (stages / "npo-lr0.001-seed0-audited.json.gz").unlink()
    kept = [*stages.parent.rglob("*.safetensors"), *(stages / "audits" / "audit").iterdir()]
    times = {path: path.stat().st_mtime_ns for path in kept}
    assert command(bench_audit, "--preset tiny --methods palu,npo --learning-rate 1e-3")["audits"] == record["audits"]
    assert {path: path.stat().st_mtime_ns for path in kept} == times


@has_muse
def test_muse_runs(monkeypatch: pytest.MonkeyPatch, command: Callable) -> None:
    monkeypatch.setitem(bench_muse_news.PRESETS, "tiny", bench_muse_news.Preset((2, 300), 1, 4, 4))
    for method, settings in bench_muse_news.METHODS.items():
        monkeypatch.setitem(bench_muse_news.METHODS, method, settings | {"epochs": 1})
    record = command(bench_muse_news, "--preset tiny")
    assert [row["model"] for row in record["results"]] == ["retain", "original", *bench_muse_news.METHODS]
    assert all(row["PrivLeak"] is not None for row in record["results"])
