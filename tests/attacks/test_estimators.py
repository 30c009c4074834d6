"""The audit's estimators, against brute force."""

from __future__ import annotations

import math
import random
from itertools import combinations, product

import pytest

from palu.attacks.estimators import LIMIT, Rho, leak_at_k, rho


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_leak_at_k_is_the_share_of_subsets_that_tell(n: int) -> None:
    for c, k in product(range(n + 1), range(1, n + 1)):
        draws = [True] * c + [False] * (n - c)
        subsets = list(combinations(draws, k))
        assert leak_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


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


def test_without_a_retain_model_its_mean_is_0() -> None:
    ours, original = [0.0, 0.5, 1.0], [1.0, 1.0, 1.0]
    assert rho(ours, original) == rho(ours, original, [0.0, 0.0, 0.0])
    assert rho(ours, original).value == 0.5


@pytest.mark.parametrize(
    ("value", "low", "high", "verdict"),
    [
        (0.0, 0.0, LIMIT, "held"),
        (0.0, 0.0, LIMIT + 1e-9, "not told"),
        (0.5, LIMIT, 0.9, "not told"),
        (0.5, LIMIT + 1e-9, 0.9, "open"),
        (0.5, None, None, "not told"),
        (0.5, 0.2, None, "open"),
        (0.0, None, 0.05, "held"),
        (None, None, None, "not told"),
    ],
)
def test_verdict(value: float | None, low: float | None, high: float | None, verdict: str) -> None:
    assert Rho(value, low, high).verdict == verdict


def test_all_told_is_open_and_none_told_held() -> None:
    ones, zeros = [1.0] * 6, [0.0] * 6
    assert rho(ones, ones) == Rho(1.0, 1.0, 1.0)
    assert rho(ones, ones).verdict == "open"
    assert rho(zeros, ones).verdict == "held"
    assert rho(zeros, zeros) == Rho(None, None, None)
    assert rho(zeros, ones, ones).verdict == "not told"


def test_resamples_without_a_rho_widen_the_interval_on_both_sides() -> None:
    """The original tells one secret of four: a third of the resamples lacks it."""
    found = rho([0.0] * 4, [1.0, 0.0, 0.0, 0.0])
    assert found == Rho(0.0, None, None)
    assert found.verdict == "not told"
