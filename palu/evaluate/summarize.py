"""Aggregate per-example values, of this package's results and of open-unlearning's logs."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from palu.evaluate import metrics
from palu.evaluate.rows import Results, load_results
from palu.models.generation import Generation

# Which losses a truth ratio is made of: the true answer's, the wrong ones'.
TRUTH_RATIOS = {
    "forget_truth_ratio": ("forget_Q_A_PARA_Prob", "forget_Q_A_PERT_Prob"),
    "retain_Truth_Ratio": ("retain_Q_A_PARA_Prob", "retain_Q_A_PERT_Prob"),
    "ra_Truth_Ratio": ("ra_Q_A_Prob", "ra_Q_A_PERT_Prob"),
    "wf_Truth_Ratio": ("wf_Q_A_Prob", "wf_Q_A_PERT_Prob"),
}
NORMALISED = {
    "ra_Q_A_Prob_normalised": ("ra_Q_A_Prob", "ra_Q_A_PERT_Prob"),
    "wf_Q_A_Prob_normalised": ("wf_Q_A_Prob", "wf_Q_A_PERT_Prob"),
}
UTILITY = (
    *("retain_Q_A_Prob", "retain_Q_A_ROUGE", "retain_Truth_Ratio"),
    *("ra_Q_A_Prob_normalised", "ra_Q_A_ROUGE", "ra_Truth_Ratio"),
    *("wf_Q_A_Prob_normalised", "wf_Q_A_ROUGE", "wf_Truth_Ratio"),
)
# Their aggregate is a share of all words of the set, not a mean over its texts.
WORD_SHARES = ("no_word", "unknown_name")
# Aggregates of other entries, computed after them.
DERIVED = ("forget_quality", "forget_quality_ks", "model_utility", "privleak")
SIDES = ("forget", "holdout")  # of a membership attack
# Entries of other models, beside those of the one that was evaluated.
OTHERS = ("original", "retain_model")

NO_RETAIN = "no retain_results were given: evaluate the model trained without the forget set and pass its results"
NO_RETAIN_AUC = "the retain_results hold no mia_min_k: evaluate the retain model with holdout rows"

Source = str | os.PathLike[str] | Mapping[str, Any]


def summarize(results: Source, retain_results: Source | None = None) -> dict[str, float | None]:
    """Recompute every aggregate from the per-example values.

    Args:
        results: what :func:`palu.evaluate.tofu` or :func:`palu.evaluate.muse` returned, or a log of
            open-unlearning's; a dict, or a path to .json or .json.gz.
        retain_results: the same of the model trained without the forget set. Without them forget quality is None
            and PrivLeak takes 0.5 for the retain model's AUC, as open-unlearning does.

    Returns:
        Metric -> aggregate, None where its values are missing. Formulas: :mod:`palu.evaluate.metrics`.

    Raises:
        ValueError: ``retain_results`` are of another split, benchmark or kind of model.
    """
    metrics.require_packages()
    results = load_results(results)
    retain = load_retain_results(retain_results, results.get("palu", {}), _indices(results))
    return _aggregates(results, retain)


def _aggregates(results: Results, retain: Results | None) -> dict[str, float | None]:
    summary: dict[str, float | None] = {}
    for name, entry in results.items():
        if name in TRUTH_RATIOS or name in NORMALISED:
            summary[name] = mean(row_values(results, name))
        elif name.startswith("mia_"):
            summary[name] = _auc(entry)
        elif name not in (*DERIVED, *OTHERS, "palu"):
            summary[name] = aggregate_of(name, entry)

    if "forget_truth_ratio" in results:
        summary |= {"forget_quality": None, "forget_quality_ks": None}
        if retain is not None:
            ratios, theirs = (list(truth_ratios(r, "forget_truth_ratio").values()) for r in (results, retain))
            summary["forget_quality"], summary["forget_quality_ks"] = metrics.forget_quality(ratios, theirs)
        nine = [value for name in UTILITY if (value := summary.get(name)) is not None]
        summary["model_utility"] = metrics.model_utility(nine) if len(nine) == len(UTILITY) else None
    if "privleak" in results or "mia_min_k" in results:
        auc = summary.get("mia_min_k")
        reference = 0.5 if retain is None else _auc(retain.get("mia_min_k", {}))
        summary["privleak"] = None if auc is None or reference is None else metrics.privleak(auc, reference)
    return summary


def aggregate_of(name: str, entry: Mapping[str, Any]) -> float | None:
    """Aggregate the values of an entry that depends on no other, or None where there are none."""
    if name.endswith(WORD_SHARES):
        counts = [(len(value["found"]), value["words"]) for value in _by_index(entry).values()]
        words = sum(count for _, count in counts)
        return sum(found for found, _ in counts) / words if words else None
    return mean(_row_values(name, entry))


def row_values(results: Results, name: str) -> list[float]:
    """Return the values, one a row, of which a metric is the mean."""
    if name in TRUTH_RATIOS:
        of_ratio = metrics.closer_to_one if name == "forget_truth_ratio" else metrics.true_better
        return [of_ratio([ratio]) for ratio in truth_ratios(results, name).values()]
    if name in NORMALISED:
        return list(normalised_probabilities(results, name).values())
    return _row_values(name, results[name])


def _row_values(name: str, entry: Mapping[str, Any]) -> list[float]:
    statistic = "prob" if name.endswith("Prob") else "score"
    if name.endswith("ROUGE"):
        statistic = "rougeL_f1" if "mem_" in name else "rougeL_recall"  # MUSE's, TOFU's
    return [float(np.mean(value)) for value in _values(entry, statistic)]


def truth_ratios(results: Results, name: str) -> dict[str, float]:
    """Compute each example's truth ratio, from the losses where the results hold them, else as stored."""
    true, wrong = (_by_index(results.get(source, {})) for source in TRUTH_RATIOS[name])
    if not true or not wrong:
        return {index: value["score"] for index, value in _by_index(results.get(name, {})).items()}
    return {i: metrics.truth_ratio(true[i]["avg_loss"], wrong[i]["avg_loss"]) for i in true}


def normalised_probabilities(results: Results, name: str) -> dict[str, float]:
    """Compute each example's probability of the true answer among the true and the wrong ones."""
    true, wrong = (_by_index(results[source]) for source in NORMALISED[name])
    return {i: metrics.normalised_probability(true[i]["prob"], wrong[i]["prob"]) for i in true}


def mean(values: Collection[Any]) -> float | None:
    """Return the mean, or None where there are no values."""
    return float(np.mean(list(values))) if values else None


# --- do two results belong together? ---
_SHARED = (  # key of the metadata, its name, what to do where it differs
    ("benchmark", "benchmark", "evaluate the retain model on the same benchmark"),
    ("split", "forget split", "evaluate the retain model on the same forget split"),
    ("model", "model", "train the retain model from the same base model"),
    ("tokenizer_vocabulary", "tokenizer vocabulary", "use the same tokenizer for both models"),
    ("max_length", "max_length", "cut the texts at the same length"),
    ("chat_template_kwargs", "chat_template_kwargs", "give the same ones for both models"),
    ("data_sha256", "evaluation data", "evaluate both models on the same rows"),
)


def load_retain_results(
    source: Source | None, metadata: Mapping[str, Any], indices: Mapping[str, set[str]]
) -> Results | None:
    """Load the retain model's results, if they are given. Raises ValueError where they do not fit a model's.

    metadata: the model's, as under the results' "palu" key; what either side lacks is not compared.
    indices: of the model's examples, as :func:`_indices` names them; an empty set is not compared.
    """
    if source is None:
        return None
    retain = load_results(source)
    theirs = retain.get("palu", {})
    for key, name, fix in _SHARED:
        ours, other = metadata.get(key), theirs.get(key)
        if ours is not None and other is not None and ours != other:
            raise ValueError(f"retain_results do not fit: their {name} is {other}, the model's is {ours}; {fix}")
    found = _indices(retain)
    if indices.get("forget_truth_ratio") and not found["forget_truth_ratio"]:
        raise ValueError("retain_results hold no forget_truth_ratio values; give the results of a TOFU evaluation")
    for name, of_model in indices.items():
        if of_model and found[name] and of_model != found[name]:
            raise ValueError(
                f"retain_results do not fit: their {name} has {len(found[name])} examples, the model's {len(of_model)}"
                + ("" if len(of_model) != len(found[name]) else " with other indices")
                + "; they are of another split: evaluate the retain model on the same rows"
            )
    return retain


def _indices(results: Results) -> dict[str, set[str]]:
    """Return the indices of the examples whose values are compared between two models."""
    member = results.get("mia_min_k", {})
    return {
        "forget_truth_ratio": set(truth_ratios(results, "forget_truth_ratio")),
        **{f"mia_min_k of the {side} set": set(_by_index(member.get(side, {}))) for side in SIDES},
    }


# --- the entries' form ---
def entry(values: Iterable[Mapping[str, Any]], indices: Iterable[int] | None = None) -> dict[str, Any]:
    """Make a metric's entry of its values by index (None: 0, 1, ...); :func:`complete` adds the aggregate."""
    pairs = enumerate(values) if indices is None else zip(indices, values, strict=True)
    return {"value_by_index": {str(index): dict(value) for index, value in pairs}}


def rouge_value(generation: Generation, truth: str, *, any_script: bool = False) -> dict[str, Any]:
    """Make the value of a generation: its ROUGE, the true answer and the text."""
    text = generation.text.strip()
    given = {"ground_truth": truth, "generation": text, "cut_off": generation.cut_off}
    return {**metrics.rouge(text, truth, any_script=any_script), **given}


def membership_entry(forget: Sequence[float], holdout: Sequence[float]) -> dict[str, Any]:
    """Make a membership attack's entry of its scores on the forget and the holdout set."""
    if not forget or not holdout:
        return {}
    return {
        side: {"agg_value": mean(values), **entry({"score": value} for value in values)}
        for side, values in zip(SIDES, (forget, holdout), strict=True)
    }


def complete(results: Results, retain: Results | None, reasons: Mapping[str, str]) -> Results:
    """Add every aggregate to the results, and the reason for each that is null."""
    completed: Results = {}
    for name, value in _aggregates(results, retain).items():
        aggregates: dict[str, Any] = {"agg_value": value}
        if name.startswith("mia_"):
            aggregates["auc"] = value
        if value is None:
            aggregates["reason"] = reasons[name]
        completed[name] = aggregates | results.get(name, {})
    return dict(sorted(completed.items()))


def _by_index(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    return {index: value for index, value in entry.get("value_by_index", {}).items() if value is not None}


def _values(entry: Mapping[str, Any], statistic: str) -> list[Any]:
    values = (value.get(statistic) for value in _by_index(entry).values())
    return [value for value in values if value is not None]


def _auc(entry: Mapping[str, Any]) -> float | None:
    forget, holdout = (_values(entry.get(side, {}), "score") for side in SIDES)
    return metrics.auc(forget, holdout) if forget and holdout else None
