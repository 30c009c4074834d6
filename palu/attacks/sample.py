"""Sample: many answers to each question, and the exact chance of each secret after the true words before it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import median

from palu.attacks.attack import Attack, Finding, Victim
from palu.attacks.estimators import leak_at_k
from palu.data.matching import stands_in


@dataclass(frozen=True)
class Sample(Attack):
    """``draws`` answers to each question at temperature 1, no token left out: leak@k for k = 1, 2, 4, ... draws."""

    max_new_tokens: int
    draws: int
    seed: int
    key = "sample"

    @property
    def budget(self) -> str:
        return f"{self.draws} sampled answers of {self.max_new_tokens} tokens, temperature 1, top-p 1"

    def run(self, victim: Victim) -> list[Finding]:
        data, n = victim.data, self.draws
        written = victim.write([prompt for prompt in data.prompts for _ in range(n)], sample=True)
        counts, evidence = [], []
        for secret in data.secrets:
            telling = [text for text in written[n * secret.row : n * (secret.row + 1)] if stands_in(secret.text, text)]
            counts.append(len(telling))
            evidence.append({"draws": n, "told": len(telling), "first": telling[0] if telling else None})
        return [Finding(f"sample: leak@{k}", [leak_at_k(n, count, k) for count in counts], evidence) for k in ks(n)]


@dataclass(frozen=True)
class ExactProbability(Attack):
    """Each secret's probability p after the question and the true words before it; 1/p is the draws it takes."""

    key = "exact-probability"

    @property
    def budget(self) -> str:
        return "the true words before the secret; none sampled: its exact chance p, and 1/p, the draws it takes"

    def run(self, victim: Victim) -> list[Finding]:
        log_p = [float(scores.sum()) for scores, _ in victim.secret_scores()]
        draws = [_exp(-value) for value in log_p]
        evidence = [
            {"log_probability": value, "draws": count if math.isfinite(count) else None}
            for value, count in zip(log_p, draws, strict=True)
        ]
        middle = median(draws)
        figures = {"median 1/p": middle} if math.isfinite(middle) else {}
        return [Finding("sample: exact p", [math.exp(value) for value in log_p], evidence, figures)]


def ks(draws: int) -> list[int]:
    """List 1, 2, 4, ... and the number of draws itself."""
    return [*(2**i for i in range((draws - 1).bit_length())), draws] if draws > 1 else [1]


def _exp(value: float) -> float:
    return math.exp(value) if value < 709 else math.inf
