"""The methods that are compared, by the names that --methods takes: what each sets, and what tables call it."""

from __future__ import annotations

from argparse import ArgumentTypeError
from typing import Any

from palu import methods
from palu.methods.palu import RECIPES

Settings = dict[str, Any]

OBJECTIVE_METHODS: dict[str, Settings] = {name: {"objective": name} for name in methods.METHODS}
VARIANTS: dict[str, Settings] = {f"palu-{name}": {"recipe": name} for name in RECIPES}
# What the paper says of its loss: one setting of it changed at a time, by what a plot calls setting and value. The
# published value, {}, is "palu-paper".
CLAIMS: dict[str, dict[str, Settings]] = {
    "N": {"1": {"n": 1}, "2": {"n": 2}, "3": {}, "5": {"n": 5}, "all": {"n": -1}},
    "K": {"5": {"top_k": 5}, "50": {"top_k": 50}, "500": {"top_k": 500}, "5000": {}, "all": {"top_k": 10**9}},
    "target": {"mean": {}, "mean-of-K": {"target": "local_mean"}, "0": {"target": 0.0}},
    "KL": {"reverse": {}, "forward": {"kl_direction": "forward"}},
}


def claim(setting: str, value: str) -> str:
    """Return the method that has one value of CLAIMS."""
    return f"paper-{setting}={value}" if CLAIMS[setting][value] else "palu-paper"


METHODS = OBJECTIVE_METHODS | VARIANTS
METHODS |= {
    claim(setting, value): VARIANTS["palu-paper"] | changed
    for setting, values in CLAIMS.items()
    for value, changed in values.items()
}
LABELS = {name: name.upper() for name in methods.METHODS} | {
    "simnpo": "SimNPO",
    "satimp": "SatImp",
    "palu-paper": "PALU, as published",
}


def named(given: str) -> list[str]:
    """Read --methods: names separated by commas, or "claims"."""
    claims = [name for name in METHODS if name.startswith("paper-")]
    names = ["palu", "palu-paper", *claims] if given == "claims" else given.split(",")
    if unknown := [name for name in names if name not in METHODS]:
        raise ArgumentTypeError(f"{', '.join(unknown)}: choose from {', '.join(METHODS)}, or claims")
    return names
