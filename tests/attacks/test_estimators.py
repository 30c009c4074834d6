"""The audit's estimators, against brute force."""

from __future__ import annotations

import math
import random
from itertools import combinations, product

import numpy as np
import pytest

from palu.attacks.estimators import LIMIT, Rho, leak_at_k, rho, unseen_bound


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_leak_at_k_is_the_share_of_subsets_that_tell(n: int) -> None:
    for c, k in product(range(n + 1), range(1, n + 1)):
        draws = [True] * c + [False] * (n - c)
        subsets = list(combinations(draws, k))
        assert leak_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_leak_at_k_has_no_bias() -> None:
    n, k, p = 8, 3, 0.3
    weights = [sum(p**c * (1 - p) ** (n - c) for _ in combinations(range(n), c)) for c in range(n + 1)]
    assert sum(w * leak_at_k(n, c, k) for c, w in enumerate(weights)) == pytest.approx(1 - (1 - p) ** k)


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5)])
def test_leak_at_k_refuses(n: int, c: int, k: int) -> None:
    with pytest.raises(ValueError, match=rf"leak@k needs .* got n = {n}, c = {c}, k = {k}"):
        leak_at_k(n, c, k)


def test_rho_and_its_interval_are_those_of_all_resamples() -> None:
    """Four secrets have 256 resamples, which are all enumerated."""
    ours, original, retain = [0.0, 1.0, 0.25, 0.0], [1.0, 1.0, 0.5, 1.0], [0.0, 0.25, 0.0, 0.0]
    every = []
    for chosen in product(range(4), repeat=4):
        u, o, r = (np.mean([values[i] for i in chosen]) for values in (ours, original, retain))
        every.append((u - r) / (o - r))
    found = rho(ours, original, retain)
    assert found.value == pytest.approx((1.25 - 0.25) / (3.5 - 0.25))
    # Quantiles of 2000 draws of 256 equal chances: within the neighbouring percentiles.
    assert found.low is not None and np.quantile(every, 0.01) <= found.low <= np.quantile(every, 0.045)
    assert found.high is not None and np.quantile(every, 0.955) <= found.high <= np.quantile(every, 0.99)
    assert rho(ours, original, retain) == found


def test_rhos_interval_is_that_of_plain_resampling() -> None:
    """Twelve secrets, of which the original tells four: 0.8 % of the resamples have none of these, and so no rho."""
    ours = [0.25, 0.5, 0.0, 0.25] + [0.0, 0.1] * 4
    original = [1.0, 1.0, 0.75, 0.5] + [0.0] * 8
    rng = random.Random(0)
    low, high = [], []
    for _ in range(10_000):
        chosen = rng.choices(range(12), k=12)
        told, possible = (sum(values[i] for i in chosen) for values in (ours, original))
        low.append(told / possible if possible else -math.inf)
        high.append(told / possible if possible else math.inf)
    assert 0.005 < low.count(-math.inf) / len(low) < 0.012
    low.sort()
    high.sort()
    found = rho(ours, original)
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


def test_rho_refuses_different_secrets() -> None:
    with pytest.raises(ValueError, match="the same secrets of each model, one or more, got 2, 3, 2"):
        rho([0.0, 1.0], [1.0, 1.0, 1.0])
    with pytest.raises(ValueError, match="one or more, got 0, 0, 0"):
        rho([], [])


def test_unseen_bound() -> None:
    for secrets in (1, 6, 60):
        assert (1 - unseen_bound(secrets)) ** secrets == pytest.approx(0.05)
