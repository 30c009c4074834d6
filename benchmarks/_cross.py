"""The preset "cross" of bench_tofu.py: many forget sets of one author each, on some of which nothing was chosen.

Each author of TOFU's forget10 has an original and a retain model of its own. On the authors "choose" each method runs
with every learning rate (of one there is nothing to choose), and of each method the rate is taken with the highest
forget quality over all rows together, among those that keep 0.95 of the original's model utility on average (if none
does, the one that keeps most). With it the method runs on the authors "report", and these make the table: forget
quality over all rows together and by author, utility, and an audit (--quick, 8 draws, the attacks ATTACKS) whose
secrets are put together, too. Beside them stands the forget quality of a second retain model, taught the same rows in
another order: what a model gets that never saw the secrets. The authors "fresh" are in no benchmark: a default is
measured on them once it is chosen.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Sequence
from itertools import chain, pairwise
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from _measure import markdown_table
from _methods import LABELS
from _tofu import KEEPS, Bench, rank, rate_text, summary

from palu.attacks.estimators import Rho, rho
from palu.evaluate import metrics
from palu.evaluate.summarize import truth_ratios

# Author 10 is the one of the preset "tiny", on whom earlier defaults were chosen.
AUTHORS = {"choose": (0, 1, 2, 3), "report": (4, 5, 6, 7, 8, 9, 11, 12), "fresh": (13, 14, 15, 16, 17, 18, 19)}
SEED = 0  # the preset's
ATTACKS = ("ask", "ask-paraphrased", "sample", "onset-answer", "quantise-int4", "relearn-weights")
# Of what it writes for the forget rows: the table shows the model's share, and the retain model's.
LANGUAGE = {"no word": "forget_no_word", "unknown name": "forget_unknown_name", "rep-4": "forget_rep_4"}
# The audit's rows that the table shows; what a model gets out of each is in the JSON.
SHOWN = {
    "greedy": "ask: greedy",
    "paraphrased": "ask: paraphrased",
    "leak@8": "sample: leak@8",
    "onset 3": "onset: 3 in the answer",
    "int4": "quantise: int4",
    "relearn": "relearn: all weights",
}
# Of each author's run, what the JSON holds beside the truth ratios.
KEPT = ("author", "model_utility", "original_utility", "mia_min_k", "exact_memorization", "forget_Q_A_ROUGE", "seconds")
Run = dict[str, Any]


def evaluated(bench: Bench, method: str, rate: float | None) -> Run:
    """Unlearn and evaluate; returns the summary, and the truth ratios of both models by row."""
    results = bench.unlearned(method, rate, SEED)
    return forget_figures(bench, results) | {
        **summary(results, method=method, learning_rate=rate, seed=SEED),
        "original_utility": bench.original["model_utility"]["agg_value"],
        "language": {
            name: {"unlearned": results[name]["agg_value"], "retain": bench.retain[name]["agg_value"]}
            for name in LANGUAGE.values()
        },
    }


def audited(bench: Bench, method: str, rate: float | None, only: Sequence[str]) -> dict[str, Any]:
    """Unlearn and audit; returns each attack's success by secret, and :func:`token_log_p` of each model."""
    wanted = [key for key in ATTACKS if key == "onset-answer" or key in only]  # the plot reads it
    results = bench.audited(method, rate, SEED, wanted)
    return {
        "attacks": {
            row["name"]: {role: one["values"] for role, one in row["models"].items()}
            for row in results["attacks"]
            if row["models"]
        },
        "token_log_p": token_log_p(results),
    }


def forget_figures(bench: Bench, results: dict[str, Any]) -> Run:
    """Pick the forget quality from an evaluation, and the truth ratios of the model and of the retain model by row."""
    both = {"ratios": results, "retain_ratios": bench.retain}
    return {
        "author": bench.author,
        **{key: results[key]["agg_value"] for key in ("forget_quality", "forget_quality_ks")},
        **{name: list(truth_ratios(one, "forget_truth_ratio").values()) for name, one in both.items()},
    }


def run(arguments: argparse.Namespace, methods: Sequence[str], rates: Sequence[float | None]) -> dict[str, Any]:
    """Choose on some authors, and report on others; returns what the JSON holds."""
    choosing_authors = arguments.choosing_authors if len(rates) > 1 else ()
    authors = arguments.authors
    choosing, reporting = ([Bench(arguments, author) for author in some] for some in (choosing_authors, authors))
    tried = {
        method: {rate: [evaluated(bench, method, rate) for bench in choosing] for rate in rates} for method in methods
    }
    reported = {}
    for method, by_rate in tried.items():
        rate = chosen(by_rate) if choosing else rates[0]
        audits, runs = [], []
        for bench in reporting:
            audits.append(audited(bench, method, rate, arguments.attacks))
            runs.append(evaluated(bench, method, rate))
            bench.drop(method, rate, SEED)
        reported[method] = pooled(runs) | {
            "learning_rate": rate,
            "attacks": attacks([audit["attacks"] for audit in audits]),
            "token_log_p": quartiles([audit["token_log_p"] for audit in audits]),
            "runs": [{name: run[name] for name in (*KEPT, "ratios")} for run in runs],
        }
    originals = [forget_figures(bench, bench.original) for bench in reporting]
    again = [forget_figures(bench, bench.retain_again) for bench in reporting]
    return {
        "authors": AUTHORS | {"choose": choosing_authors, "report": authors},
        "learning_rates": rates,
        "choosing": {
            method: {
                rate_text(rate): {name: found[name] for name in ("forget_quality", "utility_kept")}
                for rate, found in ((rate, pooled(runs)) for rate, runs in by_rate.items() if runs)
            }
            for method, by_rate in tried.items()
        },
        "retain_ratios": [run["retain_ratios"] for run in originals],  # a list for each author
        "original": forget_quality(originals) | {"ratios": [run["ratios"] for run in originals]},
        "retain_again": forget_quality(again) | {"ratios": [run["ratios"] for run in again]},
        "reported": reported,
    }


def chosen(by_rate: dict[float | None, list[Run]]) -> float | None:
    """Choose a learning rate by the rule in this module's docstring; of equals, the one that is given first."""

    found = {rate: pooled(runs) for rate, runs in by_rate.items()}
    return max(found, key=lambda rate: rank(found[rate]["utility_kept"], KEEPS, found[rate]["forget_quality"]))


def pooled(runs: Sequence[Run]) -> dict[str, Any]:
    """Put the authors together: the forget quality of all rows, and what lies between the authors."""
    # Where the original has none, there was none to lose.
    kept = [run["model_utility"] / run["original_utility"] if run["original_utility"] else 1.0 for run in runs]
    return forget_quality(runs) | {
        "utility_kept": mean(kept),
        "utility_kept_lowest": min(kept),
        "mia_min_k": mean(run["mia_min_k"] for run in runs),
        "language": {
            name: {role: _mean(run["language"][name][role] for run in runs) for role in ("unlearned", "retain")}
            for name in LANGUAGE.values()
        },
    }


def forget_quality(runs: Sequence[Run]) -> dict[str, Any]:
    """Compute the forget quality of all authors' rows together, and its mean and lowest over the authors.

    Beside it the root mean square, over the rows, of the logarithm of the truth ratio over the retain model's. It sees
    what a test between two distributions of twenty ratios cannot: which row has which.
    """
    ratios, retain_ratios = (list(chain.from_iterable(run[key] for run in runs)) for key in ("ratios", "retain_ratios"))
    quality, distance = metrics.forget_quality(ratios, retain_ratios)
    by_author = [run["forget_quality"] for run in runs]
    return {
        "forget_quality": quality,
        "forget_quality_ks": distance,
        "forget_quality_by_author": by_author,
        "forget_quality_mean": mean(by_author),
        "forget_quality_lowest": min(by_author),
        "log_ratio_rms": math.sqrt(mean(math.log(r / s) ** 2 for r, s in zip(ratios, retain_ratios, strict=True))),
    }


def _mean(values: Iterable[float | None]) -> float | None:
    """Compute the mean of the values that are there; None without any."""
    there = [value for value in values if value is not None]
    return mean(there) if there else None


def attacks(audits: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Put the audits' secrets together: of each attack each model's share, and rho with its interval."""
    found = {}
    for name in audits[0]:
        parts = [audit[name] for audit in audits if name in audit]
        columns = {role: list(chain.from_iterable(part[role] for part in parts)) for role in parts[0]}
        rows = zip(*columns.values(), strict=True)
        asked = [i for i, values in enumerate(rows) if None not in values]
        shares = {role: [float(values[i]) for i in asked] for role, values in columns.items()}
        left: Rho = rho(shares["unlearned"], shares["original"], shares["retain"])
        found[name] = {
            "secrets": len(asked),
            **{role: mean(values) for role, values in shares.items()},
            "rho": [left.value, left.low, left.high],
            "verdict": left.verdict,
        }
    return found


def token_log_p(audit: dict[str, Any]) -> dict[str, list[list[float]]]:
    """Take from an audit the log-probability of each secret's true tokens after the true ones before them.

    Returns, for each model, one list for each place in a secret: first, second, ... token; the last list has, for each
    longer secret, the mean over all of its further tokens.
    """
    lengths = [secret["stop"] - secret["first"] for secret in audit["secrets"]]
    given = [row for row in audit["attacks"] if row["attack"] == "onset-answer"]  # one for each number of tokens
    found = {}
    for role in given[0]["models"]:
        # rests[j][i]: the sum over the tokens of secret i after its first j.
        rests = [
            [0.0 if one is None else one["log_probability"] for one in row["models"][role]["evidence"]] for row in given
        ]
        places = [
            [before - after for before, after, length in zip(*pair, lengths, strict=True) if length > j]
            for j, pair in enumerate(pairwise(rests))
        ]
        more = len(given) - 1
        places.append([rest / (n - more) for rest, n in zip(rests[more], lengths, strict=True) if n > more])
        found[role] = places
    return found


def quartiles(parts: Sequence[dict[str, list[list[float]]]]) -> dict[str, list[list[float]]]:
    """Put the authors' :func:`token_log_p` together; returns of each model the quartiles at each place."""
    return {
        role: [
            np.quantile(np.concatenate([part[role][place] for part in parts]), (0.25, 0.5, 0.75)).round(3).tolist()
            for place in range(min(len(part[role]) for part in parts))
        ]
        for role in parts[0]
    }


def markdown(found: dict[str, Any]) -> str:
    """Format the table of what :func:`run` returned.

    * marks a method that keeps less than 0.95 of the original's utility on average. What is said of the retain model's
    truth ratios is of a second one. TR rms: ``log_ratio_rms`` of :func:`forget_quality`.
    """
    reported = found["reported"]
    columns = ["", "lr", "FQ", "FQ by author", "lowest", "TR rms", "MU kept", "lowest", "Min-K", *LANGUAGE, *SHOWN]
    rows = []
    first = next(iter(reported.values()))
    for role, taught in (("original", "original"), ("retain", "retain_again")):
        words = _language(first, role) if role == "retain" else [""] * len(LANGUAGE)
        rows.append([role.capitalize(), "", *_qualities(found[taught]), *[""] * 3, *words, *_told(first, role)])
    for method, one in reported.items():
        name = LABELS.get(method, method) + " *" * (one["utility_kept"] < KEEPS)
        figures = [f"{one[key]:.2f}" for key in ("utility_kept", "utility_kept_lowest", "mia_min_k")]
        figures += [*_language(one, "unlearned"), *_told(one, "unlearned")]
        rows.append([name, rate_text(one["learning_rate"]), *_qualities(one), *figures])
    return markdown_table(columns, rows)


def _qualities(one: dict[str, Any]) -> list[str]:
    figures = [f"{one['forget_quality']:.3g}", f"{one['forget_quality_mean']:.2f}"]
    return [*figures, f"{one['forget_quality_lowest']:.2g}", f"{one['log_ratio_rms']:.2f}"]


def _language(one: dict[str, Any], role: str) -> list[str]:
    shares = [one["language"][name][role] for name in LANGUAGE.values()]
    return ["" if share is None else f"{share:.3f}" for share in shares]


def _told(one: dict[str, Any], role: str) -> list[str]:
    return [f"{one['attacks'][row][role]:.2f}" if row in one["attacks"] else "" for row in SHOWN.values()]


def plot(found: dict[str, Any], path: Path) -> None:
    """Plot what :func:`run` returned: the truth ratios that forget quality compares, and what is left of each token.

    On the right the medians and quartiles of the true tokens' probabilities, by their place in a secret.
    """
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="tight")
    left, right = figure.subplots(1, 2)
    colours = matplotlib.colormaps["tab20"].colors  # type: ignore[attr-defined]
    reported = found["reported"]
    first = next(iter(reported.values()))

    def step(ratios: Sequence[list[float]], **style: Any) -> None:
        joined = np.sort(np.concatenate(ratios))
        left.step(joined, np.arange(1, len(joined) + 1) / len(joined), where="post", **style)

    step(found["retain_again"]["ratios"], color="grey", label="Retain, taught in another order")
    shown = [("Retain", found["retain_ratios"], first["token_log_p"]["retain"], "black")]
    for colour, (name, one) in zip(colours, reported.items(), strict=False):
        ratios = [run["ratios"] for run in one["runs"]]
        shown.append((LABELS.get(name, name), ratios, one["token_log_p"]["unlearned"], colour))
    for number, (label, ratios, log_p, colour) in enumerate(shown):
        step(ratios, color=colour, label=label)
        low, middle, high = np.exp(log_p).T
        places = np.arange(1, len(middle) + 1) + (number - len(shown) / 2) * 0.06
        right.errorbar(places, middle, (middle - low, high - middle), fmt="o", color=colour, label=label, capsize=2)
    left.set(xscale="log", xlabel="truth ratio of a forget row (above 1: the wrong answers are likelier)")
    left.set(ylabel="share of rows", title="TOFU, authors that nothing was chosen on")
    last = len(first["token_log_p"]["retain"])
    right.set(yscale="log", ylabel="probability, given the true words before", title="The true tokens of the secrets")
    right.set(xlabel="place in the secret", xticks=range(1, last + 1))
    right.set_xticklabels([*map(str, range(1, last)), f"{last} and later"])
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=120)
