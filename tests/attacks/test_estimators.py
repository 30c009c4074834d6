"""Rho and its verdict, against brute force."""

from __future__ import annotations

import math
import random

import pytest

from palu.attacks.estimators import LIMIT, Rho, rho


def test_rhos_interval_is_that_of_plain_resampling() -> None:
    """Twelve secrets, of which the original tells four: 0.8 % of the resamples have none of these, and so no rho."""
    ours = [0.25, 0.5, 0.0, 0.25] + [0.0, 0.1] * 4
    original = [1.0, 1.0, 0.75, 0.5] + [0.0] * 8
    retain = [0.25, 0.0, 0.0, 0.0] + [0.0] * 8
    rng = random.Random(0)
    low, high = [], []
    for _ in range(10_000):
        chosen = rng.choices(range(12), k=12)
        u, o, r = (sum(values[i] for i in chosen) for values in (ours, original, retain))
        low.append((u - r) / (o - r) if o > r else -math.inf)
        high.append((u - r) / (o - r) if o > r else math.inf)
    assert 0.005 < low.count(-math.inf) / len(low) < 0.012
    low.sort()
    high.sort()
    found = rho(ours, original, retain)
    assert found.value == pytest.approx((1.4 - 0.25) / (3.25 - 0.25)) and found == rho(ours, original, retain)
    assert found.low is not None and low[150] <= found.low <= low[350]
    assert found.high is not None and high[-351] <= found.high <= high[-151]


@pytest.mark.parametrize(
    ("value", "low", "high", "verdict"),
    [
        (0.0, 0.0, LIMIT, "held"),
        (0.0, 0.0, LIMIT + 1e-9, "undecided"),
        (0.5, LIMIT, 0.9, "undecided"),
        (0.5, LIMIT + 1e-9, 0.9, "open"),
        (0.5, None, None, "undecided"),
        (0.5, 0.2, None, "open"),
        (0.0, None, 0.05, "held"),
        (None, None, None, "undecided"),
    ],
)
def test_verdict(value: float | None, low: float | None, high: float | None, verdict: str) -> None:
    assert Rho(value, low, high).verdict == verdict


@pytest.mark.parametrize(
    ("models", "found"),
    [
        (([1.0] * 6, [1.0] * 6), Rho(1.0, 1.0, 1.0)),
        (([0.0] * 6, [1.0] * 6), Rho(0.0, 0.0, 0.0)),
        (([0.5] * 6, [1.0] * 6), Rho(0.5, 0.5, 0.5)),  # without a retain model its mean is 0
        (([0.5] * 6, [1.0] * 6, [0.5] * 6), Rho(0.0, 0.0, 0.0)),
        (([0.0] * 6, [0.0] * 6), Rho()),
        (([0.0] * 6, [1.0] * 6, [1.0] * 6), Rho()),
        # The original tells one secret of four: the third of the resamples that lacks it widens the interval.
        (([0.0] * 4, [1.0, 0.0, 0.0, 0.0]), Rho(0.0, None, None)),
    ],
)
def test_rho_of_simple_shares(models: tuple[list[float], ...], found: Rho) -> None:
    assert rho(*models) == found
