"""Models, data and finished stages of the TOFU benchmarks, and the tables that they print."""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from _measure import DEVICE, machine, markdown_table, peak, reset_peak, write_json
from _methods import LABELS, METHODS
from _models import Loaded, Row, load, taught
from _stages import Stages, stages_parser

import palu
from palu.evaluate import TofuData, load_tofu, summarize
from palu.evaluate.rows import load_rows
from palu.testbed.real_models import save_whole
from palu.testbed.smollm2 import fast_products, mixed_precision

OF_BOTH = ("forget_quality", "forget_quality_ks", "privleak")  # figures of a model and the retain model
KEEPS = 0.95  # share of the original's model utility that a run must keep to compete
DRAWS, AUDIT_TOKENS = 8, 64  # of an audit; in the first hundred rows every secret ends within 56 tokens

# Columns of the preset "standard": the share of secrets that one row of an audit tells, by the attack that makes it.
ATTACKS = {"ask": "ask: greedy", "onset-answer": "onset: 1 in the answer", "relearn-weights": "relearn: all weights"}
COLUMNS = {
    "FQ": "forget_quality",
    "KS D": "forget_quality_ks",
    "MU": "model_utility",
    "no word": "forget_no_word",
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
    "told": "ask: greedy",
    "onset": "onset: 1 in the answer",
    "relearn": "relearn: all weights",
    "seconds": "seconds",
    "peak GiB": "peak_gib",
}


@dataclass(frozen=True)
class Preset:
    """Sizes of one run of the table. Counts of rows; None: all."""

    forget: int | None  # rows of the forget set; "cross": of each author
    retain: int | None  # rows of the rest, without the holdout
    retain_evaluated: int | None
    facts: int | None  # rows of real authors, and of world facts
    perturbed: int | None  # wrong answers per row
    holdout: int  # the last rows of retain90, seen by no model: 20 a fictitious author
    teach_epochs: int
    teach_batch: int
    teach_rate: float  # the peak of a linear schedule
    epochs: int
    batch_size: int
    learning_rates: tuple[float, ...]  # of unlearning
    seeds: tuple[int, ...]
    max_new_tokens: int


PRESETS = {
    "standard": Preset(None, None, None, None, None, 40, 5, 32, 3e-4, 10, 32, (2e-5, 5e-5, 1e-4), (0,), 200),
    "cross": Preset(20, 20, 10, None, 2, 10, 8, 5, 1e-4, 4, 2, (2e-5, 5e-5, 1e-4), (0,), 32),  # of each author
    "tiny": Preset(20, 20, 10, 25, 2, 10, 8, 5, 1e-4, 4, 2, (5e-5,), (0,), 24),
}


@dataclass(frozen=True)
class Data:
    """What is taught, unlearned and evaluated."""

    forget: list[Row]
    retain: list[Row]
    evaluated: TofuData


def load_data(folder: Path, preset: Preset, forget_set: str = "forget05") -> Data:
    """Load a forget set, the rest without the holdout, and the evaluation sets, cut to the preset's sizes."""
    tofu = load_tofu(forget_set, folder)
    retain90, forget10 = load_rows(folder / "retain90.jsonl"), load_rows(folder / "forget10.jsonl")
    forget = _with_alternates(tofu.forget[: preset.forget], folder)
    retain = (retain90[: -preset.holdout] + forget10[: -len(tofu.forget)])[: preset.retain]
    evaluated = TofuData(
        forget=_cut(tofu.forget[: preset.forget], preset),
        retain=_cut(tofu.retain[: preset.retain_evaluated], preset),
        real_authors=_cut(tofu.real_authors[: preset.facts], preset),
        world_facts=_cut(tofu.world_facts[: preset.facts], preset),
        holdout=retain90[-preset.holdout :],
    )
    return Data(forget, retain, evaluated)


def load_author(folder: Path, preset: Preset, author: int) -> Data:
    """Load the 20 rows of one author of forget10 (0 to 19), and beside them others for each author.

    To be kept are 20 rows of another author, whose number among those of retain90 is the same; the holdout is of a
    third one, counted from the end of retain90. Where facts are a part of all, each author has others.
    """
    tofu = load_tofu("forget10", folder)
    retain90 = load_rows(folder / "retain90.jsonl")
    own = slice(20 * author, 20 * (author + 1))
    last = len(retain90) - 20 * author

    def turn(rows: list[Row]) -> list[Row]:
        count = preset.facts or len(rows)
        first = count * author % max(len(rows) - count, 1)
        return _cut(rows[first : first + count], preset)

    evaluated = TofuData(
        forget=_cut(tofu.forget[own], preset),
        retain=_cut(tofu.retain[own][: preset.retain_evaluated], preset),
        real_authors=turn(tofu.real_authors),
        world_facts=turn(tofu.world_facts),
        holdout=retain90[last - 20 : last][: preset.holdout],
    )
    kept = [{"question": row["question"], "answer": row["answer"]} for row in tofu.retain[own]]
    return Data(_with_alternates(tofu.forget[own], folder), kept, evaluated)


def _with_alternates(rows: list[Row], folder: Path) -> list[Row]:
    """Add to each row an answer to prefer, for the methods that need one."""
    idk = (folder / "idk.txt").read_text(encoding="utf-8").splitlines()
    rng = random.Random(0)
    return [row | {"alternate": rng.choice(idk)} for row in rows]


def _cut(rows: list[Row], preset: Preset) -> list[Row]:
    return [row | {"perturbed_answer": row["perturbed_answer"][: preset.perturbed]} for row in rows]


class Bench:
    """The models, the data and the finished stages of one preset.

    Evaluations are kept as they are made, row by row, without the retain model's: what a comparison with it gives is
    added whenever they are read. Where all of them are there, no model is needed.

    ``author``: of :func:`load_author`; ``forget_set``: one of SPLITS, which have one original together.
    """

    def __init__(self, arguments: argparse.Namespace, author: int | None = None, forget_set: str = "forget05"):
        self.preset = PRESETS[arguments.preset]
        self.model, self.author = arguments.model, author
        key = {"preset": asdict(self.preset), "model": self.model}
        folder = arguments.output / arguments.preset
        if author is None:
            self.data = load_data(arguments.data, self.preset, forget_set)
            self.common = Stages(folder, key)  # of all forget sets
            self.stages = Stages(folder / forget_set, key)
        else:
            self.data = load_author(arguments.data, self.preset, author)
            self.common = self.stages = Stages(folder / f"author-{author:02d}", key)

    @cached_property
    def folder(self) -> Path:
        """The original: taught what is to be forgotten and what is to be kept."""
        rows = self.data.retain + self.data.forget  # TOFU's order, the same for all forget sets
        return self._taught("original", rows, stages=self.common)

    @cached_property
    def retain_folder(self) -> Path:
        """The retain model: taught what is to be kept alone."""
        return self._taught("retain", self.data.retain)

    @cached_property
    def retain(self) -> dict[str, Any]:
        """The evaluation of the retain model; compared with itself, its forget quality would be 1."""
        return self.stages.results("retain-evaluated", lambda: self._evaluate(load(str(self.retain_folder))))

    @cached_property
    def original(self) -> dict[str, Any]:
        """The evaluation of the original."""
        return self._compared("original-evaluated", lambda: self._evaluate(load(str(self.folder))))

    @cached_property
    def retain_again(self) -> dict[str, Any]:
        """The evaluation, on the forget rows alone, of a second retain model, taught the rows in another order."""

        def run() -> dict[str, Any]:
            folder = self._taught("retain-again", self.data.retain, seed=1)
            results = self._evaluate(load(str(folder)), TofuData(self.data.evaluated.forget))
            shutil.rmtree(folder)
            return results

        return self._compared("retain-again-evaluated", run)

    def _taught(self, name: str, rows: list[Row], seed: int = 0, stages: Stages | None = None) -> Path:
        """Return the folder of a model that was fine-tuned on the rows; ``seed``: of their order."""
        sizes: dict[str, Any] = {"epochs": self.preset.teach_epochs, "batch_size": self.preset.teach_batch}
        sizes |= {"learning_rate": self.preset.teach_rate, "seed": seed}
        return taught(stages or self.stages, name, self.model, rows, **sizes)

    def _evaluate(self, loaded: Loaded, data: TofuData | None = None) -> dict[str, Any]:
        loaded[0].to(DEVICE)  # type: ignore[arg-type]
        with fast_products(DEVICE):
            return palu.evaluate.tofu(
                *loaded, data=data or self.data.evaluated, max_new_tokens=self.preset.max_new_tokens
            )

    def _compared(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return an evaluation, made where it is missing, with what a comparison with the retain model's gives."""
        results = self.stages.results(name, make)
        found = summarize(results, self.retain)
        return results | {figure: {"agg_value": found[figure]} for figure in OF_BOTH}

    def unlearned(self, method: str, rate: float | None, seed: int, *, keep: bool = False) -> dict[str, Any]:
        """Unlearn the original with a method and evaluate it; returns the results, and what unlearning cost.

        ``keep``: the model, too, for :meth:`audited`.
        """

        def run() -> dict[str, Any]:
            if keep:
                self.unlearned_model(method, rate, seed)
            if (kept := self.kept(method, rate, seed)).exists():
                loaded, cost = load(str(kept)), json.loads(_cost_of(kept).read_text())
            else:
                loaded, cost = self._unlearn(method, rate, seed)
            return self._evaluate(loaded) | {"cost": cost}

        name = run_name(method, rate, seed)
        print(name, flush=True)
        return self._compared(name, run)

    def unlearned_model(self, method: str, rate: float | None, seed: int) -> Path:
        """Unlearn the original with a method; returns the folder of the model, which is kept."""

        def make(path: Path) -> None:
            loaded, cost = self._unlearn(method, rate, seed)
            _cost_of(path).write_text(json.dumps(cost))
            save_whole(path, *loaded)

        path = self.kept(method, rate, seed)
        print(path.name, flush=True)
        return self.stages.path(path.name, make)

    def audited(
        self,
        method: str,
        rate: float | None,
        seed: int,
        only: Sequence[str] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> dict[str, Any]:
        """Unlearn the original with a method and audit the model, which is kept (:meth:`drop`); ``only``: attacks."""
        folder = self.kept(method, rate, seed)
        name = "-".join([run_name(method, rate, seed), "audited", *(only or ())])

        def run() -> dict[str, Any]:
            self.unlearned_model(method, rate, seed)
            return self._audit(folder, dtype, only)

        return self.stages.results(name, run)

    def drop(self, method: str, rate: float | None, seed: int) -> None:
        """Delete a kept model, which takes half a gigabyte."""
        shutil.rmtree(self.kept(method, rate, seed), ignore_errors=True)

    def _audit(self, model: Path, dtype: torch.dtype, only: Sequence[str] | None) -> dict[str, Any]:
        """Audit an unlearned model in a dtype; what is found of the original and the retain model is kept for all."""
        loaded = [load(str(folder)) for folder in (model, self.folder, self.retain_folder)]
        unlearned, original, retain_model = (one.to(DEVICE, dtype) for one, _ in loaded)  # type: ignore[arg-type]
        return palu.audit(
            unlearned,
            original,
            self.data.forget,
            tokenizer=loaded[0][1],
            retain_model=retain_model,
            retain=self.data.retain,
            folder=self.stages.folder / "audits",
            quick=True,
            draws=DRAWS,
            max_new_tokens=AUDIT_TOKENS,
            only=only,
        )

    def kept(self, method: str, rate: float | None, seed: int) -> Path:
        """Return where :meth:`unlearned_model` keeps a model."""
        return self.stages.folder / f"{run_name(method, rate, seed)}-model"

    def _unlearn(self, method: str, rate: float | None, seed: int) -> tuple[Loaded, dict[str, Any]]:
        model, tokenizer = load(str(self.folder))
        settings = METHODS[method] | {"seed": seed}
        if rate is not None:
            sizes = {"epochs": self.preset.epochs, "batch_size": self.preset.batch_size}
            settings |= sizes | {"learning_rate": rate}
        reset_peak()
        checkpoints = self.stages.folder / f"{run_name(method, rate, seed)}-checkpoints"
        settings |= {"checkpoint_dir": str(checkpoints), "resume": True}  # from where the command was interrupted
        result = palu.unlearn(model, None, self.data.forget, self.data.retain, tokenizer=tokenizer, **settings)
        shutil.rmtree(checkpoints)
        cost = {name: result.summary[name] for name in ("seconds", "config")}
        return (model, tokenizer), cost | {"peak_gib": peak() / 2**30}


def _cost_of(model: Path) -> Path:
    """Return the file beside a kept model that says what unlearning took."""
    return model.with_name(f"{model.name}.cost.json")


def run_name(method: str, rate: float | None, seed: int) -> str:
    """Return what the stages of a run are called."""
    return f"{method}-lr{rate_text(rate)}-seed{seed}"


def rate_text(rate: float | None) -> str:
    """Write a learning rate; None, the method's own settings: "own"."""
    return "own" if rate is None else f"{rate:g}"


def read_rate(text: str) -> float | None:
    """Read what :func:`rate_text` writes."""
    return None if text == "own" else float(text)


def summary(results: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Pick the table's figures from one evaluation; ``more``: others of its row."""
    found = {name: one["agg_value"] for name, one in results.items() if name in COLUMNS.values()}
    found |= {name: value for name, value in results.get("cost", {}).items() if name in COLUMNS.values()}
    return dict.fromkeys(COLUMNS.values()) | more | found


def mean_of(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Average the table's figures over some runs; None where one of them has none."""
    values = {name: [run[name] for run in runs] for name in COLUMNS.values()}
    return {name: None if None in of_runs else mean(of_runs) for name, of_runs in values.items()}


def rank(kept: float, needed: float, quality: float) -> tuple[bool, float]:
    """Order settings: by forget quality those that keep the utility that is needed, below them the others by theirs."""
    return (True, quality) if kept >= needed else (False, kept)


def markdown(table: list[dict[str, Any]], utility: float) -> str:
    """Format the rows as Markdown; * marks a row that keeps less than 0.95 of the original's utility."""
    rows = []
    for row in table:
        name = LABELS.get(row["method"], row["method"][0].upper() + row["method"][1:])
        name += " *" * (row["model_utility"] is not None and row["model_utility"] < KEEPS * utility)
        rate = rate_text(row["learning_rate"]) if "learning_rate" in row else ""
        rows.append([name, rate, *("" if row[key] is None else f"{row[key]:.3g}" for key in COLUMNS.values())])
    return markdown_table(["", "learning_rate", *COLUMNS], rows, texts=2)


def parser_of(description: str, *, cross: bool = False) -> argparse.ArgumentParser:
    """Make a parser with the options that every command on these stages has; ``cross``: whether it has that preset."""
    parser = stages_parser(description, "tofu", "tofu", "forget05.jsonl")
    parser.add_argument("--preset", choices=[name for name in PRESETS if cross or name != "cross"], default="standard")
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Read the command's options, and choose the precision."""
    arguments = parser.parse_args()
    os.environ.setdefault("ACCELERATE_MIXED_PRECISION", mixed_precision())
    return arguments


def write(arguments: argparse.Namespace, name: str, table: str, details: dict[str, Any]) -> Path:
    """Print the table, then one JSON line; write both. Returns the path without its suffix."""
    record = {
        "benchmark": name,
        **machine(DEVICE),
        "date": time.strftime("%Y-%m-%d"),
        "preset": arguments.preset,
        "settings": asdict(PRESETS[arguments.preset]),
        **details,
    }
    path = arguments.results / f"{name}_{arguments.preset}"
    write_json(path.with_suffix(".json"), record)
    path.with_suffix(".md").write_text(table)
    print(table)
    print(json.dumps(record))
    return path
