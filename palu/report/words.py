"""Say settings and metrics in plain words."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from palu.config import UnlearnConfig
from palu.methods import METHODS
from palu.report.plots import number
from palu.training.checkpoint import FREE

TARGETS = {
    "global_mean": "the mean of all logits",
    "global_mean_detached": "the mean of all logits, taken as a constant",
    "local_mean": "their own mean",
}

# Figures of the history that are not terms of the loss, and titles of those that are.
NOT_PLOTTED = {"step", "epoch", "tokens", "tokens_per_second"}
SERIES = {
    "loss": "Total loss",
    "kl": "KL to the reference (kl)",
    "forget": "Loss on the forget set (forget)",
    "retain": "Loss on the retain set (retain)",
    "grad_norm": "Gradient norm, before clipping",
    "onset_probability": "Highest probability of an onset token",
    "learning_rate": "Learning rate",
}
# How a secret may be told, by its names in the record.
TOLD = {"asked": "told when asked", "paraphrased": "in other words", "rest": "after its first token"}
LOCAL = {"unlikelihood": "Unlikelihood loss (local)", "topk_mse": "Local entropy loss (local)"}


class Metric(NamedTuple):
    """How to read one figure of an evaluation."""

    label: str
    better: str


_HIGHER, _LOWER, _HALF = "higher", "lower", "near 0.5"
_UNSEEN = "as a model that never saw it"


def _language(prefix: str, of: str) -> dict[str, Metric]:
    """List the language figures of one set of generations."""
    return {
        f"{prefix}_no_word": Metric(f"Broken words, {of}", _LOWER),
        f"{prefix}_unknown_name": Metric(f"Capitalised words that no list has, {of}", _UNSEEN),
        f"{prefix}_rep_4": Metric(f"Repeated 4-grams (rep-4), {of}", _LOWER),
        f"{prefix}_replacement_character": Metric(f"Texts with characters that are none (U+FFFD), {of}", _LOWER),
        f"{prefix}_empty": Metric(f"Empty answers, {of}", _LOWER),
    }


METRICS = {
    "forget_quality": Metric("Forget quality (p-value)", _HIGHER),
    "forget_quality_ks": Metric("Forget quality's KS distance", _LOWER),
    "model_utility": Metric("Model utility", _HIGHER),
    "forget_told": Metric("Secrets told, questions about them", _LOWER),
    "forget_Q_A_Prob": Metric("Probability, forget set", _LOWER),
    "forget_Q_A_ROUGE": Metric("ROUGE-L recall, forget set", _LOWER),
    "forget_truth_ratio": Metric("Truth ratio, forget set", _HIGHER),
    **_language("forget", "forget set"),
    "exact_memorization": Metric("Exact memorisation", _UNSEEN),
    "extraction_strength": Metric("Extraction strength", _LOWER),
    "forget_extraction_strength": Metric("Extraction strength, forget set", _LOWER),
    "privleak": Metric("PrivLeak", "near 0"),
    "mia_loss": Metric("Membership attack: loss", _HALF),
    "mia_zlib": Metric("Membership attack: zlib", _HALF),
    "mia_reference": Metric("Membership attack: reference", _HALF),
    "mia_gradnorm": Metric("Membership attack: gradient norm", _HALF),
    "mia_min_k": Metric("Membership attack: Min-K", _HALF),
    "mia_min_k_plus_plus": Metric("Membership attack: Min-K++", _HALF),
    "retain_told": Metric("Told, questions about what is kept", _HIGHER),
    "retain_Q_A_Prob": Metric("Probability, retain set", _HIGHER),
    "retain_Q_A_ROUGE": Metric("ROUGE-L recall, retain set", _HIGHER),
    "retain_extraction_strength": Metric("Extraction strength, retain set", _HIGHER),
    "retain_Truth_Ratio": Metric("Truth ratio, retain set", _HIGHER),
    **_language("retain", "retain set"),
    "ra_Q_A_Prob_normalised": Metric("Probability, real authors", _HIGHER),
    "ra_Q_A_ROUGE": Metric("ROUGE-L recall, real authors", _HIGHER),
    "ra_Truth_Ratio": Metric("Truth ratio, real authors", _HIGHER),
    "wf_Q_A_Prob_normalised": Metric("Probability, world facts", _HIGHER),
    "wf_Q_A_ROUGE": Metric("ROUGE-L recall, world facts", _HIGHER),
    "wf_Truth_Ratio": Metric("Truth ratio, world facts", _HIGHER),
    "forget_verbmem_ROUGE": Metric("Verbatim memorisation (VerbMem), forget set", _LOWER),
    "forget_knowmem_ROUGE": Metric("Knowledge memorisation (KnowMem), forget set", _LOWER),
    "retain_knowmem_ROUGE": Metric("Knowledge memorisation (KnowMem), retain set", _HIGHER),
    **_language("forget_verbmem", "VerbMem, forget set"),
    **_language("forget_knowmem", "KnowMem, forget set"),
    **_language("retain_knowmem", "KnowMem, retain set"),
}


def method(settings: Mapping[str, Any]) -> str:
    """Return the method's name."""
    name = str(settings.get("objective", "palu"))
    return METHODS[name].title if name in METHODS else name


def series(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the titles of the history's figures."""
    return SERIES | {"local": LOCAL[settings.get("local_loss", "topk_mse")]}  # older runs have no such setting


def asked(summary: Mapping[str, Any]) -> list[str]:
    """Say what the run was asked to do, a sentence each. ``summary``: of :class:`palu.UnlearnResult`."""
    s = summary["config"]
    return [*_data(summary), *(_palu(s) if s["objective"] == "palu" else _baseline(s)), *_training(summary)]


def _data(summary: Mapping[str, Any]) -> list[str]:
    plain, skipped = summary["forget_without_span"], summary["forget_skipped"] + summary["retain_skipped"]
    cut, lost = summary.get("forget_spans_cut", 0), summary.get("forget_all_spans_cut", 0)  # not in older summaries
    sentences = [f"Forget the marked words of {count(summary['forget_examples'] - plain - lost, 'answer')}."]
    if cut:
        length = f"the maximum length of {count(summary['config']['max_length'], 'token')}"
        sentences.append(f"Marked words of {count(cut, 'answer')} were cut off by {length}: these are not forgotten.")
    if lost:
        sentences.append(f"No marked word is left in {count(lost, 'answer')}, so nothing is forgotten there.")
    if plain:
        sentences.append(f"Hold the model to what it said before on {count(plain, 'answer')} without marked words.")
    kept, anchors = summary["retain_examples"], summary.get("anchors", 0)
    sentences.append(f"Keep {count(kept, 'answer')} of the retain set." if kept else "There is no retain set.")
    if not kept and summary["config"].get("neighbours") and summary.get("neighbours") == 0:
        sentences.append("The model wrote no question like those to be forgotten: give such rows as a retain set.")
    if neighbours := summary.get("neighbours", 0):
        like = f"{count(neighbours, 'question')} like those to be forgotten, which it wrote itself"
        sentences.append(f"Hold the model to its own answers to {like}.")
    if variants := summary.get("variants", 0):
        sentences.append(f"Forget the marked words in {count(variants, 'other wording')} of its own, too.")
    if anchors:
        sentences.append(f"Hold the model to its own answers to {count(anchors, 'everyday prompt')}.")
    if skipped:
        sentences.append(f"{count(skipped, 'example')} left out, longer than the maximum length before the answer.")
    return sentences


def _palu(s: Mapping[str, Any]) -> list[str]:
    whole = s["n"] == -1
    first = "all tokens" if whole else "the first token" if s["n"] == 1 else f"the first {s['n']} tokens"
    kept = f" (at most {s['kl_rows']} of each forget answer)" if s.get("kl_rows") else ""
    return [
        f"PALU acts on {first} of each marked span (the onset){'' if whole else ' and on no other token of it'}.",
        _unlikelihood(s) if s.get("local_loss") == "unlikelihood" else _topk_mse(s),
        f"Weights: {number(s['gamma'])} for this local loss, {number(s['lambda_kl'])} for the KL divergence to the "
        f"reference on ordinary tokens{kept} ({s['kl_direction']}), {number(s['lambda_retain'])} for the retain set.",
    ]


def _unlikelihood(s: Mapping[str, Any]) -> str:
    floor = f", while its probability is above {number(s['probability_floor'])}" if s["probability_floor"] else ""
    among = f"among the {s['top_k']} candidates that the reference ranks highest"
    return f"There it makes the true token less probable (unlikelihood) {among}{floor}."


def _topk_mse(s: Mapping[str, Any]) -> str:
    target = s["target"]
    towards = TARGETS.get(target, target) if isinstance(target, str) else f"the value {number(target)}"
    return f"There it pulls the {s['top_k']} logits that the reference ranks highest towards {towards}."


def _baseline(s: Mapping[str, Any]) -> list[str]:
    return [
        f"The method is {method(s)}, one that PALU is compared with.",
        f"Weights: {number(s['gamma'])} for its forget loss, {number(s['lambda_retain'])} for the retain set.",
    ]


def _training(summary: Mapping[str, Any]) -> list[str]:
    s = summary["config"]
    forget = s["batch_size"] * s["gradient_accumulation_steps"] * summary.get("processes", 1)
    name = "AdamW with 8-bit moments" if s.get("optimizer") == "adamw_8bit" else "AdamW"
    trained = f"{name} took {count(summary['steps'], 'step')} of up to {count(forget, 'forget example')} each"
    epochs = count(summary["epochs"], "epoch")
    if s.get("max_steps") is None:
        epochs = f"{summary['epochs']} of at most {count(s['epochs'], 'epoch')}"
    ran = f"over {epochs}, at a learning rate of "
    sentences = [f"{trained}, {ran}{number(s['learning_rate'])}."]
    if summary.get("ended_by") == "callback":
        sentences.append("It stopped early: a callback ended it.")
    elif summary.get("ended_by") == "forgotten":
        sentences.append(
            "It ended by itself: in half of its epochs, the latest, no token to be forgotten was probable."
        )
    return sentences


def advice(known: bool, left: Sequence[int], *, damaged: bool) -> str:
    """Say what to do about a run's outcome; nothing where all is well.

    Args:
        known: whether any secret was known before it.
        left: the rows of the forget set of which a secret is still known.
        damaged: whether the model lost what it should keep.
    """
    if not known:
        return "ask the model your questions first: rows must ask as it answers (docs/outcome.md)"
    rows = f"rows {', '.join(map(str, left[:10]))}{', ...' * (len(left) > 10)} remain" if left else ""
    if damaged:
        return "; ".join(filter(None, (rows, "lower the learning rate, or give retain examples (docs/outcome.md)")))
    return f"{rows}; allow more epochs, or raise the learning rate (docs/outcome.md)" if left else ""


def settings(config: Mapping[str, Any], hide: Callable[[str], str] = str) -> list[tuple[str, str, str, bool]]:
    """List the settings that have a part in the result: (name, value, default, whether they differ).

    hide: blots the secrets out of mappings, which alone hold the user's texts.
    """
    objective = config.get("objective", "palu")
    defaults = UnlearnConfig(objective).values() if objective in METHODS else {}  # else of a class that is not here
    rows = []
    for name, value in config.items():
        if name not in FREE:
            default = "palu" if name == "objective" else defaults.get(name, value)
            rows.append((name, _shown(value, hide), _shown(default, hide), value != default))
    return rows


def count(n: int, noun: str) -> str:
    """Format a number and its noun."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def percent(share: float) -> str:
    """Format a share in percent; less than all is never rounded up to it."""
    return f"{min(100 * share, 99.9) if share < 1 else 100:.1f}".removesuffix(".0") + " %"


def probability(value: float | None) -> str:
    """Format a probability: three decimals, or three significant digits where it is small; "> 0.999" near 1."""
    if value is None or value < 0.1:
        return number(value)
    return "> 0.999" if 0.9995 <= value < 1 else f"{value:.3f}"


def duration(seconds: float) -> str:
    """Format seconds in the units that a reader would use."""
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def _shown(value: Any, hide: Callable[[str], str]) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return hide(json.dumps(value, ensure_ascii=False))
    return f"{value:g}" if isinstance(value, float) else str(value)
