"""The methods that are compared, by the names that --methods takes: what each sets, and what tables call it."""

from __future__ import annotations

from argparse import ArgumentTypeError
from typing import Any

from palu import methods
from palu.methods.palu import RECIPES

Settings = dict[str, Any]

OBJECTIVE_METHODS: dict[str, Settings] = {name: {"objective": name} for name in methods.METHODS}
VARIANTS: dict[str, Settings] = {f"palu-{name}": {"recipe": name} for name in RECIPES}
# One setting of the default changed at a time.
ABLATION: dict[str, Settings] = {
    "no-anchors": {"anchors": 0},
    "no-neighbours": {"neighbours": 0},
    "no-variants": {"variants": 0},
    "K=2": {"top_k": 2},
    "K=1000": {"top_k": 1000},
    "K=V": {"top_k": 10**9},
    "N=1": {"n": 1},
    "N=3": {"n": 3},
    "floor-.1": {"probability_floor": 0.1},
    "floor-.005": {"probability_floor": 0.005},
    "KL-forward": {"kl_direction": "forward"},
    "KL=1": {"lambda_kl": 1.0},
    "KL=4": {"lambda_kl": 4.0},
}
METHODS = OBJECTIVE_METHODS | VARIANTS | ABLATION
LABELS = {name: name.upper() for name in methods.METHODS} | {
    "simnpo": "SimNPO",
    "satimp": "SatImp",
    "palu-paper": "PALU, as published",
}


def named(given: str) -> list[str]:
    """Read --methods: names separated by commas, or "ablation"."""
    names = ["palu", "palu-paper", *ABLATION] if given == "ablation" else given.split(",")
    if unknown := [name for name in names if name not in METHODS]:
        raise ArgumentTypeError(f"{', '.join(unknown)}: choose from {', '.join(METHODS)}, or ablation")
    return names
