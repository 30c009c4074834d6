"""Forgetting and utility on TOFU of PALU, eight other methods and PALU's settings, on one model and one code path.

    python benchmarks/bench_tofu.py --preset tiny                      # CPU, a subset
    python benchmarks/bench_tofu.py --preset cross                     # CPU, many hours: twelve authors, see _cross.py
    python benchmarks/bench_tofu.py --preset full   --data tofu               # one GPU
    python benchmarks/bench_tofu.py --preset tiny --methods ablation   # one setting of PALU changed at a time

Stages: teach a model the whole data set ("original") and one the data without the forget set ("retain"), evaluate
both, then for each method, setting and seed: unlearn, evaluate. Every finished stage is kept in --output, so that the
same command goes on where it stopped. When all are done it writes tofu_<preset>.json and .md to --results (and .png for
"cross").

The final weights are used, never a chosen epoch. Every method, PALU included, gets the same settings: the preset's
learning rates and seeds, or those that are given; everything else is at its default. The table shows of each method the
setting with the highest forget quality among those that keep 0.95 of the original's model utility, or if none does, the
one with the highest utility.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import _cross
from _methods import METHODS, OBJECTIVE_METHODS, named
from _tofu import KEEPS, PRESETS, Bench, markdown, mean_of, parse, parser_of, rank, read_rate, summary, write


def run(
    bench: Bench, methods: Sequence[str], learning_rates: Sequence[float | None], seeds: Sequence[int]
) -> list[dict[str, Any]]:
    """Unlearn and evaluate with each method, learning rate and seed; returns a summary of each evaluation."""
    rows = [summary(bench.original, method="original"), summary(bench.retain, method="retain")]
    for seed, learning_rate, method in itertools.product(seeds, learning_rates, methods):
        results = bench.unlearned(method, learning_rate, seed)
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


def main() -> None:
    parser = parser_of(str(__doc__), cross=True)
    add, authors = parser.add_argument, _cross.AUTHORS
    numbers: dict[str, Any] = {"type": int, "nargs": "+"}
    reported: dict[str, Any] = {"default": authors["report"], "choices": authors["report"] + authors["fresh"]}
    choosing: dict[str, Any] = {"default": authors["choose"], "choices": authors["choose"]}
    attacks: dict[str, Any] = {"nargs": "+", "default": _cross.ATTACKS, "choices": _cross.ATTACKS}
    objectives = ",".join(OBJECTIVE_METHODS)
    add("--methods", type=named, default=objectives, help="of _methods.py, separated by commas, or ablation")
    rates_help = (
        "default: the preset's; own: what a run finds itself, and the epochs and batch size that it has by default"
    )
    add("--learning-rates", type=read_rate, nargs="+", help=rates_help)
    add("--seeds", **numbers, help="default: the preset's; cross has one")
    add("--authors", **numbers, **reported, help="cross: those to report")
    add("--choosing-authors", **numbers, **choosing, help="cross: those on which a learning rate is chosen")
    add("--attacks", **attacks, help="cross: those of the audit (onset-answer is always made); default: all")
    arguments = parse(parser)
    if arguments.preset == "cross":
        if arguments.seeds:
            parser.error("--preset cross has one seed")
        rates = arguments.learning_rates or PRESETS["cross"].learning_rates
        found = _cross.run(arguments, arguments.methods, rates)
        path = write(arguments, "tofu", _cross.markdown(found), found)
        _cross.plot(found, path.with_suffix(".png"))
        return
    bench = Bench(arguments)
    learning_rates = arguments.learning_rates or bench.preset.learning_rates
    seeds = arguments.seeds or bench.preset.seeds
    rows = run(bench, arguments.methods, learning_rates, seeds)
    utility = bench.original["model_utility"]["agg_value"]
    table = chosen(rows, utility)
    details = {"learning_rates": learning_rates, "seeds": seeds, "table": table, "runs": rows}
    write(arguments, "tofu", markdown(table, utility), details)


if __name__ == "__main__":
    main()
