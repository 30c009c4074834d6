"""The paper's table on TOFU: PALU and seven baselines, on one model, one data set and one code path.

    python benchmarks/tofu_table.py --preset tiny                      # CPU, a subset
    python benchmarks/tofu_table.py --preset full --data tofu --minutes 9   # one GPU, in pieces

Stages: teach a model the whole data set ("original") and one the data without the forget set ("retain"), evaluate
both, then for each method, setting and seed: unlearn, evaluate. Every finished stage is kept in --output, so that the
same command goes on where it stopped; with --minutes it stops by itself (exit code 3) before a stage that would not
fit. When all are done it writes tofu_<preset>.json, .md and .png to --results.

The final weights are used, never a chosen epoch. Every method, PALU included, gets the same settings: the preset's
learning rates, everything else at its default. The table shows of each method the setting with the highest forget
quality among those that keep 0.95 of the original's model utility, or if none does, the one with the highest utility.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from _models import Loaded, Row, load, save, teach
from _stages import OutOfTimeError, Stages
from _timing import machine
from _workload import DATA

import palu
from palu.config import OBJECTIVES
from palu.evaluate import TofuData, load_tofu
from palu.evaluate.rows import read_rows

METHODS = {name: name.upper() for name in ("ga", "gd", "dpo", "npo")} | {"simnpo": "SimNPO"}
METHODS |= {name: name.upper() for name in ("pdu", "tpo", "palu")}
assert METHODS.keys() == OBJECTIVES.keys()
KEEPS = 0.95  # share of the original's model utility that a run must keep to compete

COLUMNS = {
    "FQ": "forget_quality",
    "KS D": "forget_quality_ks",
    "MU": "model_utility",
    "Fluency": "forget_fluency",
    "EM": "exact_memorization",
    "F-TR": "forget_truth_ratio",
    "Ra-TR": "ra_Truth_Ratio",
    "R-TR": "retain_Truth_Ratio",
    "Rw-TR": "wf_Truth_Ratio",
    "Min-K": "mia_min_k",
    "Min-K++": "mia_min_k_plus_plus",
    "PrivLeak": "privleak",
    "ES": "extraction_strength",
    "ROUGE": "forget_Q_A_ROUGE",
    "seconds": "seconds",
    "peak GiB": "peak_gib",
}


@dataclass(frozen=True)
class Preset:
    """Sizes of one run of the table. Counts of rows; None: all."""

    forget: int | None  # rows of forget05
    retain: int | None  # rows of retain95, without the holdout
    retain_evaluated: int | None
    facts: int | None  # rows of real authors, and of world facts
    perturbed: int | None  # wrong answers per row
    holdout: int  # the last rows of retain90, seen by no model: 20 a fictitious author
    teach_epochs: int
    teach_batch: int
    epochs: int
    batch_size: int
    learning_rates: tuple[float, ...]
    seeds: tuple[int, ...]
    max_new_tokens: int


PRESETS = {
    "full": Preset(None, None, None, None, None, 400, 8, 32, 10, 32, (1e-5, 2e-5, 5e-5), (0, 1, 2), 200),
    "tiny": Preset(20, 20, 10, 10, 3, 10, 8, 5, 4, 5, (5e-5,), (0,), 24),
}


@dataclass(frozen=True)
class Data:
    """What is taught, unlearned and evaluated."""

    forget: list[Row]
    retain: list[Row]
    evaluated: TofuData


def load_data(folder: Path, preset: Preset) -> Data:
    """forget05 and retain95 without the holdout, and the evaluation sets, cut to the preset's sizes."""
    tofu = load_tofu("forget05", folder)
    retain90, forget10 = read_rows(folder / "retain90.jsonl"), read_rows(folder / "forget10.jsonl")
    idk = (folder / "idk.txt").read_text(encoding="utf-8").splitlines()
    rng = random.Random(0)
    forget = [row | {"alternate": rng.choice(idk)} for row in tofu.forget[: preset.forget]]

    def cut(rows: list[Row], count: int | None) -> list[Row]:
        return [row | {"perturbed_answer": row["perturbed_answer"][: preset.perturbed]} for row in rows[:count]]

    retain = (retain90[: -preset.holdout] + forget10[:200])[: preset.retain]
    evaluated = TofuData(
        forget=cut(tofu.forget, preset.forget),
        retain=cut(tofu.retain, preset.retain_evaluated),
        real_authors=cut(tofu.real_authors, preset.facts),
        world_facts=cut(tofu.world_facts, preset.facts),
        holdout=retain90[-preset.holdout :],
    )
    return Data(forget, retain, evaluated)


def evaluate(loaded: Loaded, data: Data, preset: Preset, fluency_model: str | None, retain: Any) -> dict[str, Any]:
    return palu.evaluate.tofu(
        *loaded,
        data=data.evaluated,
        retain_results=retain,
        fluency_model=fluency_model,
        mia=("min_k", "min_k_plus_plus"),
        max_new_tokens=preset.max_new_tokens,
    )


def unlearn(
    original: Path, data: Data, preset: Preset, method: str, learning_rate: float, seed: int, device: torch.device
) -> tuple[Loaded, dict[str, Any]]:
    """The unlearned model, and what it cost."""
    model, tokenizer = load(str(original))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    result = palu.unlearn(
        model,
        None,
        data.forget,
        data.retain,
        tokenizer=tokenizer,
        objective=method,
        learning_rate=learning_rate,
        epochs=preset.epochs,
        batch_size=preset.batch_size,
        seed=seed,
    )
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
    return (model, tokenizer), {
        "seconds": result.summary["seconds"],
        "peak_gib": peak,
        "config": result.summary["config"],
    }


def summary(results: dict[str, Any], **more: Any) -> dict[str, Any]:
    """The table's figures of one evaluation."""
    figures = {name: results[name]["agg_value"] for name in COLUMNS.values() if name in results}
    return more | {"seconds": None, "peak_gib": None} | results.get("cost", {}) | figures


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """All stages; a summary of each evaluation."""
    preset = PRESETS[arguments.preset]
    data = load_data(arguments.data, preset)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    key = {"preset": asdict(preset), "model": arguments.model, "fluency_model": arguments.fluency_model}
    stages = Stages(arguments.output / arguments.preset, arguments.minutes, json.loads(json.dumps(key)))

    def taught(name: str, rows: list[Row]) -> Path:
        def make(path: Path) -> None:
            loaded = load(arguments.model)
            teach(loaded, rows, epochs=preset.teach_epochs, batch_size=preset.teach_batch, label=f"teach {name}")
            save(loaded, path)

        return stages.path(name, make)

    def evaluated(folder: Path, retain: Any) -> dict[str, Any]:
        model, tokenizer = load(str(folder))
        return evaluate((model.to(device), tokenizer), data, preset, arguments.fluency_model, retain)  # type: ignore[arg-type]

    original = taught("original", data.forget + data.retain)
    retained = taught("retain", data.retain)
    of_retain = stages.results("retain-evaluated", lambda: evaluated(retained, None))
    of_original = stages.results("original-evaluated", lambda: evaluated(original, of_retain))
    rows = [summary(of_original, method="original"), summary(of_retain, method="retain")]

    def unlearned(method: str, learning_rate: float, seed: int) -> dict[str, Any]:
        loaded, cost = unlearn(original, data, preset, method, learning_rate, seed, device)
        return evaluate(loaded, data, preset, arguments.fluency_model, of_retain) | {"cost": cost}

    for seed, learning_rate, method in itertools.product(preset.seeds, preset.learning_rates, arguments.methods):
        name = f"{method}-lr{learning_rate:g}-seed{seed}"
        print(name, flush=True)
        results = stages.results(name, lambda: unlearned(method, learning_rate, seed))  # noqa: B023
        rows.append(summary(results, method=method, learning_rate=learning_rate, seed=seed))
    return rows


def chosen(rows: list[dict[str, Any]], utility: float) -> list[dict[str, Any]]:
    """One row a method: the mean over seeds of its chosen setting (see the module's docstring)."""
    table = [row for row in rows if "learning_rate" not in row]
    for method in METHODS:
        by_setting: dict[float, list[dict[str, Any]]] = {}
        for row in rows:
            if row["method"] == method:
                by_setting.setdefault(row["learning_rate"], []).append(row)
        if not by_setting:
            continue

        def rank(runs: list[dict[str, Any]]) -> tuple[bool, float]:
            kept = mean(run["model_utility"] for run in runs)
            if kept >= KEEPS * utility:
                return True, mean(run["forget_quality"] for run in runs)
            return False, kept

        best = max(by_setting.values(), key=rank)
        means = {
            name: None if any(run[name] is None for run in best) else mean(run[name] for run in best)
            for name in COLUMNS.values()
        }
        table.append(
            {"method": method, "learning_rate": best[0]["learning_rate"], "seeds": len(best), "keeps": rank(best)[0]}
            | means
        )
    return table


def markdown(table: list[dict[str, Any]]) -> str:
    """The table; * marks a method that loses more than 5 % of the original's utility at every setting."""
    lines = ["| method | lr | " + " | ".join(COLUMNS) + " |", "|---|---" + "|---:" * len(COLUMNS) + "|"]
    for row in table:
        name = METHODS.get(row["method"], row["method"].capitalize()) + ("" if row.get("keeps", True) else " *")
        figures = ["" if row[key] is None else f"{row[key]:.3g}" for key in COLUMNS.values()]
        rate = f"{row['learning_rate']:g}" if "learning_rate" in row else ""
        lines.append(f"| {name} | {rate} | " + " | ".join(figures) + " |")
    return "\n".join(lines) + "\n"


def plot(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Forget quality against model utility, every run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 5))
    colours = plt.get_cmap("tab10").colors  # type: ignore[attr-defined]
    for number, (method, label) in enumerate(METHODS.items()):
        runs = [row for row in rows if row["method"] == method]
        if runs:
            axis.scatter(
                [row["model_utility"] for row in runs],
                [row["forget_quality"] for row in runs],
                color=colours[number],
                marker="*" if method == "palu" else "os^vDPX"[number],
                s=140 if method == "palu" else 45,
                label=label,
            )
    original = next(row for row in rows if row["method"] == "original")
    axis.scatter(original["model_utility"], original["forget_quality"], color="black", marker="x", label="Original")
    retain = next(row for row in rows if row["method"] == "retain")
    axis.axvline(retain["model_utility"], color="black", linewidth=1, linestyle=":", label="Retain")
    axis.axvline(KEEPS * original["model_utility"], color="grey", linewidth=1, linestyle="--", label="0.95 of Original")
    axis.axhline(0.05, color="grey", linewidth=0.5)
    axis.set(yscale="log", xlabel="model utility (MU)", ylabel="forget quality (FQ, p-value)", title=title)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--preset", choices=PRESETS, default="full")
    parser.add_argument("--data", type=Path, default=DATA, help="TOFU's folder, with retain90, forget10 and idk.txt")
    parser.add_argument("--model", default="smollm2", help="smollm2, or a name or path")
    parser.add_argument("--fluency-model", default=None, help="a gibberish classifier; without one, no fluency")
    parser.add_argument("--methods", default=",".join(METHODS), help="some of them, separated by commas")
    parser.add_argument("--output", type=Path, default=Path("runs/tofu"), help="folder of the finished stages")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--minutes", type=float, default=None, help="stop before a stage that would not fit")
    arguments = parser.parse_args()
    arguments.methods = arguments.methods.split(",")
    if unknown := set(arguments.methods) - METHODS.keys():
        parser.error(f"--methods: {', '.join(sorted(unknown))}: choose from {', '.join(METHODS)}")
    if not (arguments.data / "forget05.jsonl").exists():
        parser.error(f"--data: {arguments.data} holds no forget05.jsonl; give TOFU's folder")
    if torch.cuda.is_available():
        os.environ.setdefault("ACCELERATE_MIXED_PRECISION", "bf16")
    started = time.monotonic()
    try:
        rows = run(arguments)
    except OutOfTimeError as stage:
        print(f"no time for stage {stage}; run the same command again to go on")
        raise SystemExit(3) from None

    utility = next(row["model_utility"] for row in rows if row["method"] == "original")
    table = chosen(rows, utility)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    record = {
        "benchmark": "tofu_table",
        **machine(device),
        "date": time.strftime("%Y-%m-%d"),
        "preset": arguments.preset,
        "settings": asdict(PRESETS[arguments.preset]),
        "minutes": round((time.monotonic() - started) / 60, 1),
        "table": table,
        "runs": rows,
    }
    arguments.results.mkdir(parents=True, exist_ok=True)
    path = arguments.results / f"tofu_{arguments.preset}"
    path.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    path.with_suffix(".md").write_text(markdown(table))
    plot(rows, path.with_suffix(".png"), f"TOFU forget05, {arguments.preset}: every run")
    print(markdown(table))
    print(json.dumps({key: value for key, value in record.items() if key != "runs"}))


if __name__ == "__main__":
    main()
