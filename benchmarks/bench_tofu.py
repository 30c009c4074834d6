"""Forgetting and utility on TOFU of PALU, eight other methods and PALU's settings, on one model and one code path.

    python benchmarks/bench_tofu.py --preset standard                  # the paper's table, not run yet: days
    python benchmarks/bench_tofu.py --preset tiny                      # CPU, a subset
    python benchmarks/bench_tofu.py --preset cross                     # CPU, many hours: twelve authors, see _cross.py
    python benchmarks/bench_tofu.py --preset tiny --methods ablation   # one setting of PALU changed at a time

Stages: teach a model the whole data set ("original") and one the data without the forget set ("retain"), evaluate
both, then for each method, setting and seed: unlearn, evaluate. Every finished stage is kept in --output, which can be
moved; the same command goes on where it stopped, in the middle of teaching and unlearning, too, to the same bits. When
all are done it writes tofu_<preset>.json and .md to --results (and .png for "cross").

"standard" teaches all of TOFU but the 40 last rows of retain90, which membership metrics need as a holdout: five epochs
of batches of 32, as published, with a learning rate of 1e-4 (published: 1e-5 at seven times the width of SmolLM2). It
reports each of --forget-sets. The first one is where the rate of each method is chosen: there it runs with its own
("own": what the run finds, and its default epochs and batches) and with the preset's; on the others with its own and
with that.

The final weights are used, never a chosen epoch. Every method, PALU included, gets the same settings: the preset's
learning rates and seeds, or those that are given; everything else is at its default. The table shows of each method the
setting with the highest forget quality among those that keep 0.95 of the original's model utility, or if none does, the
one with the highest utility.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import _cross
from _methods import METHODS, OBJECTIVE_METHODS, named
from _tofu import (
    KEEPS,
    PRESETS,
    Bench,
    markdown,
    mean_of,
    parse,
    parser_of,
    rank,
    read_rate,
    summary,
    write,
)

from palu.evaluate.tofu import SPLITS

Rates = Sequence[float | None]


def run(bench: Bench, rates: Mapping[str, Rates], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Unlearn and evaluate with each method, its learning rates and each seed; returns a summary of each evaluation."""
    rows = [summary(bench.original, method="original"), summary(bench.retain, method="retain")]
    for seed, (method, of_method) in itertools.product(seeds, rates.items()):
        for learning_rate in of_method:
            results = bench.unlearned(method, learning_rate, seed)
            rows.append(summary(results, method=method, learning_rate=learning_rate, seed=seed))
    return rows


def run_standard(arguments: argparse.Namespace, rates: Rates, seeds: Sequence[int]) -> dict[str, Any]:
    """Choose on the first forget set, and report all (see the module's docstring); returns table and runs of each."""
    wanted: dict[str, Rates] = dict.fromkeys(arguments.methods, (None, *rates))
    found = {}
    for name in arguments.forget_sets:
        bench = Bench(arguments, forget_set=name)
        rows = run(bench, wanted, seeds)
        rows.insert(2, summary(bench.retain_again, method="retain, another order"))
        utility = bench.original["model_utility"]["agg_value"]
        given = [row for row in rows if row.get("learning_rate") is not None]
        best = chosen(given, utility)
        wanted = {row["method"]: (None, row["learning_rate"]) for row in best}
        table = chosen([row for row in rows if row not in given], utility) + best
        found[name] = {"utility": utility, "table": table, "runs": rows}
    return found


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
    sets_help = "standard: those to report; the rate is chosen on the first"
    add("--forget-sets", nargs="+", default=SPLITS, choices=SPLITS, help=sets_help)
    add("--authors", **numbers, **reported, help="cross: those to report")
    add("--choosing-authors", **numbers, **choosing, help="cross: those on which a learning rate is chosen")
    add("--attacks", **attacks, help="cross: those of the audit (onset-answer is always made); default: all")
    arguments = parse(parser)
    preset = PRESETS[arguments.preset]
    rates, seeds = arguments.learning_rates or preset.learning_rates, arguments.seeds or preset.seeds
    if arguments.preset == "cross":
        if arguments.seeds:
            parser.error("--preset cross has one seed")
        found = _cross.run(arguments, arguments.methods, rates)
        path = write(arguments, "tofu", _cross.markdown(found), found)
        _cross.plot(found, path.with_suffix(".png"))
        return
    details: dict[str, Any] = {"learning_rates": rates, "seeds": seeds}
    if arguments.preset == "standard":
        found = run_standard(arguments, rates, seeds)
        tables = [f"{name}\n\n{markdown(one['table'], one['utility'])}" for name, one in found.items()]
        write(arguments, "tofu", "\n".join(tables), details | found)
        return
    bench = Bench(arguments)
    rows = run(bench, dict.fromkeys(arguments.methods, rates), seeds)
    utility = bench.original["model_utility"]["agg_value"]
    table = chosen(rows, utility)
    write(arguments, "tofu", markdown(table, utility), details | {"table": table, "runs": rows})


if __name__ == "__main__":
    main()
