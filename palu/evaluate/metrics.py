"""Every metric's formula, from numbers to numbers, without a model.

NLL is the mean negative log-probability of an answer's tokens, the end of sequence included. Exact memorisation,
extraction strength, Min-K and Min-K++ are given a text's tokens without the last one, the end of sequence.
"""

from __future__ import annotations

import re
import unicodedata
import zlib
from collections.abc import Sequence
from functools import cache

import numpy as np

from palu.data.matching import words_of

_missing: ImportError | None = None
try:
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.tokenizers import DefaultTokenizer
    from scipy.stats import hmean, ks_2samp
    from sklearn.metrics import roc_auc_score
except ImportError as error:
    _missing = error

K = 0.4  # share of tokens that Min-K and Min-K++ look at
_TINY = 1e-10  # open-unlearning's guard against division by zero; its published numbers contain it

Values = Sequence[float] | np.ndarray


def require_packages() -> None:
    """Raise ImportError where what the metrics are computed with is missing; scoring a model alone needs none of it."""
    if _missing is not None:
        raise ImportError(
            f"this evaluation needs rouge-score, scipy and scikit-learn ({_missing}); "
            "pip install 'palu-unlearn[evaluate]'"
        ) from _missing


# --- of one text ---
def exact_memorization(correct: Sequence[bool] | np.ndarray) -> float:
    """EM: share of tokens that are the argmax (arXiv 2208.02309)."""
    return float(np.mean(correct))


def extraction_strength(correct: Sequence[bool] | np.ndarray) -> float:
    """ES = 1 - k/n, k the shortest prefix after which every token is the argmax; 0 if the last one is not."""
    wrong = np.flatnonzero(~np.asarray(correct, dtype=bool))
    return 1.0 - (int(wrong[-1]) + 1) / len(correct) if len(wrong) else 1.0


def min_k(log_prob: Values) -> float:
    """Min-K (arXiv 2310.16789): minus the mean of the lowest max(1, int(K n)) token log-probabilities."""
    return -float(np.sort(np.asarray(log_prob))[: max(1, int(K * len(log_prob)))].mean())


def min_k_plus_plus(log_prob: Values, mean: Values, variance: Values) -> float:
    """Min-K++ (arXiv 2404.02936): Min-K of (log p - mu) / sqrt(max(var, 1e-6)), per token.

    ``mean`` and ``variance`` are those of log p over the vocabulary, under p.
    """
    deviation = np.sqrt(np.maximum(np.asarray(variance), 1e-6))
    return min_k((np.asarray(log_prob) - np.asarray(mean)) / deviation)


def zlib_score(nll: float, text: str) -> float:
    """NLL per byte of the compressed text (Carlini et al., USENIX Security 2021)."""
    return nll / len(zlib.compress(text.encode()))


def truth_ratio(true_nll: float, wrong_nll: Sequence[float]) -> float:
    """r = exp(-mean NLL of the wrong answers) / exp(-NLL of the true one) (TOFU)."""
    return float(np.exp(-np.mean(wrong_nll)) / (np.exp(-true_nll) + _TINY))


def normalised_probability(true: float, wrong: Sequence[float]) -> float:
    """p(true) / (p(true) + sum of p(wrong)) (TOFU)."""
    return true / (true + sum(wrong) + _TINY)


def rouge(generation: str, truth: str, *, any_script: bool = False) -> dict[str, float]:
    """ROUGE-1 recall, ROUGE-L F1 and ROUGE-L recall, with stemming; 0 for an empty generation.

    As published, a to z and digits are all that counts; ``any_script``: other letters, too.
    """
    score = _scorer(any_script=any_script).score(truth, generation)
    return {
        "rouge1_recall": float(score["rouge1"].recall),
        "rougeL_f1": float(score["rougeL"].fmeasure),
        "rougeL_recall": float(score["rougeL"].recall),
    }


@cache
def _scorer(*, any_script: bool) -> RougeScorer:
    return RougeScorer(["rouge1", "rougeL"], use_stemmer=True, tokenizer=_Words() if any_script else None)


class _Words:
    """Tokenises any script, and a word of a to z and digits as rouge-score does."""

    def tokenize(self, text: str) -> list[str]:
        runs = re.findall(r"[^\W_]+", unicodedata.normalize("NFC", text).casefold())
        english = DefaultTokenizer(use_stemmer=True)
        return [token for run in runs for token in (english.tokenize(run) if run.isascii() else words_of(run))]


# --- of a set ---
def closer_to_one(ratios: Values) -> float:
    """Mean min(r, 1/r): the forget set's truth ratio, best when the truth is as likely as a lie."""
    r = np.asarray(ratios)
    return float(np.minimum(r, 1 / (r + _TINY)).mean())


def true_better(ratios: Values) -> float:
    """Mean max(0, 1 - r): every other set's truth ratio."""
    return float(np.maximum(0, 1 - np.asarray(ratios)).mean())


def forget_quality(ratios: Values, retain_ratios: Values) -> tuple[float, float]:
    """(p, D) of the two-sample Kolmogorov-Smirnov test on forget truth ratios, this model's and the retain model's."""
    test = ks_2samp(ratios, retain_ratios)
    return float(test.pvalue), float(test.statistic)


def model_utility(nine: Values) -> float:
    """Harmonic mean of probability, ROUGE-L recall and truth ratio of retain, real authors and world facts."""
    return float(hmean(nine))


def auc(forget: Values, holdout: Values) -> float:
    """Area under the ROC curve of a score that is higher for a non-member: 1 when the forget set is memorised."""
    labels = [0] * len(forget) + [1] * len(holdout)
    return float(roc_auc_score(labels, [*forget, *holdout]))


def privleak(forget_auc: float, retain_auc: float = 0.5) -> float:
    """100 ((1 - AUC) - (1 - AUC_retain)) / (1 - AUC_retain) (MUSE): 0 is best, -100 is no forgetting."""
    score, reference = 1 - forget_auc, 1 - retain_auc
    return 100 * (score - reference) / (reference + _TINY)
