"""Forgetting and utility on TOFU of PALU, eight other methods and PALU's settings, on one model and one code path.

    python benchmarks/bench_tofu.py --preset standard                  # the paper's table: days
    python benchmarks/bench_tofu.py --preset standard --evaluate-only  # without attacks and further seeds
    python benchmarks/bench_tofu.py --preset tiny                      # CPU, a subset
    python benchmarks/bench_tofu.py --preset cross                     # CPU, many hours: twelve authors, see _cross.py
    python benchmarks/bench_tofu.py --preset standard --methods claims --forget-sets forget05   # the paper's settings

Stages: teach a model the whole data set ("original") and one the data without the forget set ("retain"), evaluate
both, then for each method, setting and seed: unlearn, evaluate. Every finished stage is kept in --output, which can be
moved; the same command goes on where it stopped, in the middle of teaching and unlearning, too, to the same bits. When
all are done it writes tofu_<preset>.json and .md to --results (and .png for "cross").

"standard" teaches all of TOFU but the 40 last rows of retain90, which membership metrics need as a holdout: five epochs
of batches of 32, as published, at the learning rate with which the taught answers become as probable as those of the
published Llama-3.2-1B (benchmarks/README.md). It reports each of --forget-sets. The first one is where the rate of each
method is chosen: there it runs with its own ("own": what the run finds, and its default epochs and batches) and with
the preset's; on the others with its own and with that. What is reported of PALU and NPO is the mean of three seeds.
Each model is attacked, too: the shares of secrets that it tells when asked, after the first true token, and trained on
other rows. The JSON holds each run's utility in its nine parts, with 95 % intervals.

"claims" are the paper's own settings (CLAIMS in _methods.py), one changed at a time; each has a panel in the plot.

The final weights are used, never a chosen epoch. Every method, PALU included, gets the same settings: the preset's
learning rates and seeds, or those that are given; everything else is at its default. The table shows of each method the
setting with the highest forget quality among those that keep 0.95 of the original's model utility, or if none does, the
one with the highest utility.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import _cross
import numpy as np
from _methods import CLAIMS, METHODS, OBJECTIVE_METHODS, VARIANTS, claim, named
from _tofu import (
    ATTACKS,
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
from scipy.stats import hmean

from palu.evaluate.summarize import UTILITY, row_values
from palu.evaluate.tofu import SPLITS

SEVERAL = ("palu", "npo")  # whose reported settings run with three seeds
RESAMPLES = 2000  # of a bootstrap
Rates = Sequence[float | None]


def run(
    bench: Bench,
    rates: Mapping[str, Rates],
    seeds: Sequence[int],
    attacks: Sequence[str] = (),
    *,
    keep: bool = False,
) -> list[dict[str, Any]]:
    """Unlearn, evaluate and attack with each method, its learning rates and each seed; returns a row of each.

    ``keep``: the models that are not attacked.
    """
    known = {"original": bench.original, "retain": bench.retain}
    shares: dict[str, dict[str, float]] = {name: {} for name in known}
    rows = []
    for seed, (method, of_method) in itertools.product(seeds, rates.items()):
        for learning_rate in of_method:
            results = bench.unlearned(method, learning_rate, seed, keep=keep or bool(attacks))
            shares |= told(bench.audited(method, learning_rate, seed, attacks)) if attacks else {"unlearned": {}}
            if attacks:
                bench.drop(method, learning_rate, seed)
            more = shares["unlearned"] | {"utility": utility_parts(results)}
            rows.append(summary(results, method=method, learning_rate=learning_rate, seed=seed, **more))
    models = [summary(one, method=name, utility=utility_parts(one), **shares[name]) for name, one in known.items()]
    return models + rows


def run_standard(arguments: argparse.Namespace, rates: Rates, seeds: Sequence[int]) -> dict[str, Any]:
    """Choose on the first forget set, and report all (see the module's docstring); returns table and runs of each."""
    tried: dict[str, Rates] = {method: [*dict.fromkeys((None, *rates))] for method in arguments.methods}
    attacks, several = ([], ()) if arguments.evaluate_only else ([*ATTACKS], SEVERAL)
    found = {}
    for name in arguments.forget_sets:
        bench = Bench(arguments, forget_set=name)
        rows = run(bench, tried, seeds, attacks, keep=True)
        if not arguments.evaluate_only:
            rows.insert(2, summary(bench.retain_again, method="retain, another order"))
        utility = bench.original["model_utility"]["agg_value"]
        given = [row for row in rows if row.get("learning_rate") is not None]
        best = {row["method"]: row["learning_rate"] for row in chosen(given, utility)}
        tried = {method: [None, best[method]] if method in best else [None] for method in tried}
        again = {method: tried[method] for method in several if method in tried}
        rows += run(bench, again, [max(seeds) + 1, max(seeds) + 2], attacks)[2:]
        own = [row for row in rows if row.get("learning_rate") is None]
        reported = [row for row in rows if row not in own and row["learning_rate"] == best[row["method"]]]
        table = chosen(own, utility) + chosen(reported, utility)
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


def utility_parts(results: dict[str, Any]) -> dict[str, list[float]]:
    """Compute the model utility and the nine parts of which it is the harmonic mean.

    Returns, for each, the value and the bounds of its 95 % interval: percentiles of a bootstrap over the rows.
    """
    rng = np.random.default_rng(0)
    means = []
    for name in UTILITY:
        values: Any = np.array(row_values(results, name))
        drawn = rng.integers(len(values), size=(RESAMPLES, len(values)))
        means.append(np.array([values.mean(), *values[drawn].mean(1)]))
    means.append(hmean(means, axis=0))
    return {
        name: [float(one[0]), *np.quantile(one[1:], (0.025, 0.975)).tolist()]
        for name, one in zip((*UTILITY, "model_utility"), means, strict=True)
    }


def told(audit: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Take from an audit, for each model, the share of secrets that it tells to each of ATTACKS."""
    rows = {row["name"]: row["models"] for row in audit["attacks"] if row["name"] in ATTACKS.values()}
    return {role: {name: models[role]["told"] for name, models in rows.items()} for role in audit["models"]}


def plot_claims(tables: Mapping[str, list[dict[str, Any]]], path: Path) -> None:
    """Plot forget quality and model utility against each setting of CLAIMS, a row of panels for each table."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(CLAIMS), 3.5 * len(tables)), layout="tight")
    panels = figure.subplots(len(tables), len(CLAIMS), squeeze=False)
    for line, (name, table) in zip(panels, tables.items(), strict=True):
        of = {row["method"]: row for row in table}  # the last: at the rate that was chosen
        for panel, (setting, values) in zip(line, CLAIMS.items(), strict=True):
            rows = {value: of[claim(setting, value)] for value in values if claim(setting, value) in of}
            for column, label in (("forget_quality", "forget quality"), ("model_utility", "model utility")):
                panel.plot([*rows], [row[column] for row in rows.values()], marker="o", label=label)
            panel.set(xlabel=setting, title=name, ylim=(0, 1))
            panel.grid(alpha=0.3)
    panels[0][0].legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = parser_of(str(__doc__), cross=True)
    add, authors = parser.add_argument, _cross.AUTHORS
    numbers: dict[str, Any] = {"type": int, "nargs": "+"}
    reported: dict[str, Any] = {"default": authors["report"], "choices": authors["report"] + authors["fresh"]}
    choosing: dict[str, Any] = {"default": authors["choose"], "choices": authors["choose"]}
    attacks: dict[str, Any] = {"nargs": "+", "default": _cross.ATTACKS, "choices": _cross.ATTACKS}
    everything = ",".join([*OBJECTIVE_METHODS, *VARIANTS])
    add("--methods", type=named, default=everything, help="of _methods.py, separated by commas, or claims")
    rates_help = (
        "default: the preset's; own: what a run finds itself, and the epochs and batch size that it has by default"
    )
    add("--learning-rates", type=read_rate, nargs="+", help=rates_help)
    add("--seeds", **numbers, help="default: the preset's; cross has one")
    sets_help = "standard: those to report; the rate is chosen on the first"
    add("--forget-sets", nargs="+", default=SPLITS, choices=SPLITS, help=sets_help)
    only_help = "standard: no attacks (the models are kept for them), no second retain model, no further seeds"
    add("--evaluate-only", action="store_true", help=only_help)
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
        path = write(arguments, "tofu", "\n".join(tables), details | found)
        plotted = {name: one["table"] for name, one in found.items()}
    else:
        bench = Bench(arguments)
        rows = run(bench, dict.fromkeys(arguments.methods, rates), seeds)
        utility = bench.original["model_utility"]["agg_value"]
        table = chosen(rows, utility)
        path = write(arguments, "tofu", markdown(table, utility), details | {"table": table, "runs": rows})
        plotted = {arguments.preset: table}
    if any(name.startswith("paper-") for name in arguments.methods):
        plot_claims(plotted, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
