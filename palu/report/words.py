"""Say settings and metrics in plain words."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from palu.config import UnlearnConfig
from palu.methods import METHODS
from palu.report.plots import number
from palu.training.checkpoint import MAY_CHANGE_ON_RESUME

MASK = "███"  # in place of a secret
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
    "earlier": "Rows of earlier requests that take part",
}
# How a secret may be told, by its names in the record.
TOLD = {"asked": "told when asked", "paraphrased": "in other words", "rest": "rest told once its first token is given"}
LOCAL = {"unlikelihood": "Unlikelihood loss (local)", "topk_mse": "Local entropy loss (local)"}


_HIGHER, _LOWER, _HALF = "higher", "lower", "near 0.5"
_UNSEEN = "as a model that never saw it"


def _language(prefix: str, of: str) -> dict[str, tuple[str, str]]:
    """List the language figures of one set of generations."""
    return {
        f"{prefix}_no_word": (f"Broken words, {of}", _LOWER),
        f"{prefix}_unknown_name": (f"Capitalised words that no list has, {of}", _UNSEEN),
        f"{prefix}_rep_4": (f"Repeated 4-grams (rep-4), {of}", _LOWER),
        f"{prefix}_replacement_character": (f"Texts with characters that are none (U+FFFD), {of}", _LOWER),
        f"{prefix}_empty": (f"Empty answers, {of}", _LOWER),
    }


# Figures of an evaluation: what it is, and what is better.
METRICS = {
    "forget_quality": ("Forget quality (p-value)", _HIGHER),
    "forget_quality_ks": ("Forget quality's KS distance", _LOWER),
    "model_utility": ("Model utility", _HIGHER),
    "forget_told": ("Secrets told, questions about them", _LOWER),
    "forget_Q_A_Prob": ("Probability, forget set", _LOWER),
    "forget_Q_A_ROUGE": ("ROUGE-L recall, forget set", _LOWER),
    "forget_truth_ratio": ("Truth ratio, forget set", _HIGHER),
    **_language("forget", "forget set"),
    "exact_memorization": ("Exact memorisation", _UNSEEN),
    "extraction_strength": ("Extraction strength", _LOWER),
    "forget_extraction_strength": ("Extraction strength, forget set", _LOWER),
    "privleak": ("PrivLeak", "near 0"),
    "mia_loss": ("Membership attack: loss", _HALF),
    "mia_zlib": ("Membership attack: zlib", _HALF),
    "mia_min_k": ("Membership attack: Min-K", _HALF),
    "mia_min_k_plus_plus": ("Membership attack: Min-K++", _HALF),
    "retain_told": ("Told, questions about what is kept", _HIGHER),
    "retain_Q_A_Prob": ("Probability, retain set", _HIGHER),
    "retain_Q_A_ROUGE": ("ROUGE-L recall, retain set", _HIGHER),
    "retain_extraction_strength": ("Extraction strength, retain set", _HIGHER),
    "retain_Truth_Ratio": ("Truth ratio, retain set", _HIGHER),
    **_language("retain", "retain set"),
    "ra_Q_A_Prob_normalised": ("Probability, real authors", _HIGHER),
    "ra_Q_A_ROUGE": ("ROUGE-L recall, real authors", _HIGHER),
    "ra_Truth_Ratio": ("Truth ratio, real authors", _HIGHER),
    "wf_Q_A_Prob_normalised": ("Probability, world facts", _HIGHER),
    "wf_Q_A_ROUGE": ("ROUGE-L recall, world facts", _HIGHER),
    "wf_Truth_Ratio": ("Truth ratio, world facts", _HIGHER),
    "forget_verbmem_ROUGE": ("Verbatim memorisation (VerbMem), forget set", _LOWER),
    "forget_knowmem_ROUGE": ("Knowledge memorisation (KnowMem), forget set", _LOWER),
    "retain_knowmem_ROUGE": ("Knowledge memorisation (KnowMem), retain set", _HIGHER),
    **_language("forget_verbmem", "VerbMem, forget set"),
    **_language("forget_knowmem", "KnowMem, forget set"),
    **_language("retain_knowmem", "KnowMem, retain set"),
}


def advice(known: bool, left: Sequence[int], *, damaged: bool) -> str:
    """Say what to do about a run's outcome; nothing where all is well.

    ``known``: any secret before the run. ``left``: rows of which a secret is still known.
    """
    if not known:
        return "ask the model your questions first: rows must ask as it answers (docs/outcome.md)"
    rows = f"rows {', '.join(map(str, left[:10]))}{', ...' * (len(left) > 10)} remain" if left else ""
    if damaged:
        return "; ".join(filter(None, (rows, "lower the learning rate, or give retain examples (docs/outcome.md)")))
    return f"{rows}; allow more epochs, or raise the learning rate (docs/outcome.md)" if left else ""


def settings(config: Mapping[str, Any]) -> list[tuple[str, str, str, bool]]:
    """List the settings that have a part in the result: (name, value, default, whether they differ)."""
    objective = config["objective"]
    defaults = UnlearnConfig(objective).values() if objective in METHODS else {}  # else of a class that is not here
    rows = []
    for name, value in config.items():
        if name not in MAY_CHANGE_ON_RESUME:
            default = "palu" if name == "objective" else defaults.get(name, value)
            rows.append((name, _shown(value), _shown(default), value != default))
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


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False)
    return f"{value:g}" if isinstance(value, float) else str(value)
