"""Forgetting and utility on TOFU of PALU and ten baselines: the paper's table, on one model and one code path.

    python benchmarks/bench_tofu.py --preset tiny                      # CPU, a subset
    python benchmarks/bench_tofu.py --preset cross                     # CPU, many hours: twelve authors, see _cross.py
    python benchmarks/bench_tofu.py --preset full --data tofu --minutes 9   # one GPU, in pieces

Stages: teach a model the whole data set ("original") and one the data without the forget set ("retain"), evaluate
both, then for each method, setting and seed: unlearn, evaluate. Every finished stage is kept in --output, so that the
same command goes on where it stopped; with --minutes it stops by itself (exit code 3) before a stage that would not
fit. When all are done it writes tofu_<preset>.json, .md and .png to --results.

The final weights are used, never a chosen epoch. Every method, PALU included, gets the same settings: the preset's
learning rates and seeds, or those that are given; everything else is at its default. The table shows of each method the
setting with the highest forget quality among those that keep 0.95 of the original's model utility, or if none does, the
one with the highest utility.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import _cross
from _stages import resumable
from _tofu import KEEPS, METHODS, Bench, markdown, mean_of, parser_of, prepare, rank, summary, write


def run(
    bench: Bench, methods: Sequence[str], learning_rates: Sequence[float], seeds: Sequence[int]
) -> list[dict[str, Any]]:
    """Unlearn and evaluate with each method, learning rate and seed; returns a summary of each evaluation."""
    rows = [summary(bench.original, method="original"), summary(bench.retain, method="retain")]
    for seed, learning_rate, method in itertools.product(seeds, learning_rates, methods):
        results = bench.unlearned(
            f"{method}-lr{learning_rate:g}-seed{seed}", objective=method, learning_rate=learning_rate, seed=seed
        )
        rows.append(summary(results, method=method, learning_rate=learning_rate, seed=seed))
    return rows


def chosen(rows: list[dict[str, Any]], utility: float) -> list[dict[str, Any]]:
    """Choose a setting for each method (see the module's docstring); returns a row each, the mean over its seeds."""
    table = [row for row in rows if "learning_rate" not in row]
    for method in METHODS:
        by_rate: dict[float, list[dict[str, Any]]] = {}
        for row in rows:
            if row["method"] == method:
                by_rate.setdefault(row["learning_rate"], []).append(row)
        means = [{"learning_rate": rate, "seeds": len(runs)} | mean_of(runs) for rate, runs in by_rate.items()]
        if means:
            best = max(means, key=lambda row: rank(row["model_utility"], KEEPS * utility, row["forget_quality"]))
            table.append({"method": method} | best)
    return table


def plot(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Plot forget quality against model utility, every run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 5))
    colours = [*plt.get_cmap("tab10").colors[:9], "navy"]  # type: ignore[attr-defined]  # the tenth is PALU's
    for number, (method, label) in enumerate(METHODS.items()):
        runs = [row for row in rows if row["method"] == method]
        if runs:
            axis.scatter(
                [row["model_utility"] for row in runs],
                [row["forget_quality"] for row in runs],
                color="tab:cyan" if method == "palu" else colours[number],
                marker="*" if method == "palu" else "os^vDPX<>p"[number],
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
    parser = parser_of(__doc__, cross=True)
    parser.add_argument("--methods", default=",".join(METHODS), help="some of them, separated by commas")
    parser.add_argument("--learning-rates", type=float, nargs="+", help="default: the preset's")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: the preset's")
    parser.add_argument("--authors", type=int, nargs="+", help="cross: those to report; default: eight of _cross.py")
    parser.add_argument(
        "--choosing-authors",
        type=int,
        nargs="+",
        default=_cross.AUTHORS["choose"],
        help="cross: those on which a learning rate is chosen; default: four of _cross.py",
    )
    parser.add_argument(
        "--attacks",
        nargs="+",
        default=_cross.ATTACKS,
        choices=_cross.ATTACKS,
        help="cross: those of the audit (onset-answer is always made); default: all",
    )
    arguments = parser.parse_args()
    methods = arguments.methods.split(",")
    known = _cross.NAMES if arguments.preset == "cross" else METHODS
    if unknown := set(methods) - known.keys():
        parser.error(f"--methods: {', '.join(sorted(unknown))}: choose from {', '.join(known)}")
    prepare(parser, arguments)
    if arguments.preset == "cross":
        if arguments.seeds:
            parser.error("--preset cross has one seed")
        if seen := set(arguments.authors or ()) - {*_cross.AUTHORS["report"], *_cross.AUTHORS["fresh"]}:
            parser.error(f"--authors: {', '.join(map(str, sorted(seen)))}: choose from those that are not chosen on")
        if other := set(arguments.choosing_authors) - {*_cross.AUTHORS["choose"]}:
            told = ", ".join(map(str, _cross.AUTHORS["choose"]))
            parser.error(f"--choosing-authors: {', '.join(map(str, sorted(other)))}: choose from {told}")
        rates = arguments.learning_rates or _cross.PRESETS["cross"].learning_rates
        with resumable():
            found = _cross.run(arguments, methods, rates)
        path = write(arguments, "tofu", _cross.markdown(found), found)
        _cross.plot(found, path.with_suffix(".png"))
        return
    with resumable():
        bench = Bench(arguments)
        learning_rates = arguments.learning_rates or bench.preset.learning_rates
        seeds = arguments.seeds or bench.preset.seeds
        rows = run(bench, methods, learning_rates, seeds)
    utility = bench.original["model_utility"]["agg_value"]
    table = chosen(rows, utility)
    details = {"learning_rates": learning_rates, "seeds": seeds, "table": table, "runs": rows}
    path = write(arguments, "tofu", markdown(table, utility), details)
    plot(rows, path.with_suffix(".png"), f"TOFU forget05, {arguments.preset}: every run")


if __name__ == "__main__":
    main()
