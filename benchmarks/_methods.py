"""The methods that are compared, by the names that --methods takes: what each sets, and what tables call it."""

from __future__ import annotations

from argparse import ArgumentTypeError
from typing import Any

from palu import methods
from palu.methods.palu import RECIPES

Settings = dict[str, Any]

OBJECTIVE_METHODS: dict[str, Settings] = {name: {"objective": name} for name in methods.METHODS}
VARIANTS: dict[str, Settings] = {
    **{f"palu-{name}": {"recipe": name} for name in RECIPES},
    "palu-other-prompt": {"kl_prompt": "other"},
}
# One setting changed at a time, of the recipe "onset" and of the default.
ONSET: dict[str, Settings] = {
    "no-anchors": {"anchors": 0},
    "K=1": {"top_k": 1},
    "K=50": {"top_k": 50},
    "K=1000": {"top_k": 1000},
    "K=5000": {"top_k": 5000},
    "K=V": {"top_k": 10**9},
    "N=1": {"n": 1},
    "N=2": {"n": 2},
    "N=5": {"n": 5},
    "N=all": {"n": -1},
    "target-detached": {"target": "global_mean_detached"},
    "target-local-mean": {"target": "local_mean"},
    "KL-forward": {"kl_direction": "forward"},
    "KL-times-2": {"lambda_kl": 2.0},
    "KL-times-4": {"lambda_kl": 4.0},
}
DEFAULT: dict[str, Settings] = {
    "default-floor-.1": {"probability_floor": 0.1},
    "default-floor-.005": {"probability_floor": 0.005},
    "default-N=3": {"n": 3},
}
ABLATION = {name: {"recipe": "onset"} | changed for name, changed in ONSET.items()} | DEFAULT
METHODS = OBJECTIVE_METHODS | VARIANTS | ABLATION
LABELS = {name: name.upper() for name in methods.METHODS} | {
    "simnpo": "SimNPO",
    "satimp": "SatImp",
    "palu-paper": "PALU, as published",
    "palu-onset": "PALU, onset alone",
    "palu-other-prompt": "PALU, kl_prompt other",
    "N=all": "PALU, top K on whole spans",
}


def named(given: str) -> list[str]:
    """Read --methods: names separated by commas, or "ablation"."""
    names = ["palu", "palu-onset", "palu-paper", *ABLATION] if given == "ablation" else given.split(",")
    if unknown := [name for name in names if name not in METHODS]:
        raise ArgumentTypeError(f"{', '.join(unknown)}: choose from {', '.join(METHODS)}, or ablation")
    return names
