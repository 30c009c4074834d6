"""The metrics on cases worked out by hand, and on published logs."""

from __future__ import annotations

import gzip
import json
import math
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from palu.evaluate import metrics, summarize
from palu.evaluate.scores import _score_rows

PUBLISHED = Path(__file__).parents[3] / "shared" / "data" / "published"
LOGS = {
    "Llama-2-7b-chat-hf_full_forget05": "Llama-2-7b-chat-hf_retain95",
    "Llama-2-7b-chat-hf_retain95": None,
    "Llama-3.2-1B-Instruct_full_forget10": "Llama-3.2-1B-Instruct_retain90",
    "Llama-3.2-1B-Instruct_retain90": None,
}
published = pytest.mark.skipif(not PUBLISHED.is_dir(), reason="needs the published logs in ../shared")


def content(name: str) -> dict[str, Any]:
    return json.loads(gzip.decompress((PUBLISHED / f"{name}.json.gz").read_bytes()))


# --- published logs ---
@published
@pytest.mark.parametrize(("name", "retain"), LOGS.items())
def test_published_aggregates_are_recomputed_from_the_per_example_values(name: str, retain: str | None) -> None:
    results = content(name)
    stored = {metric: entry["agg_value"] for metric, entry in results.items()}
    for entry in results.values():  # what is stored must not be read
        entry["agg_value"] = 0.123
        entry.pop("auc", None)
    for index in results["forget_truth_ratio"]["value_by_index"].values():
        index["score"] = 7.0  # derived too, from the losses
    summary = summarize(results, None if retain is None else PUBLISHED / f"{retain}.json.gz")

    assert set(summary) == {*stored, "forget_quality_ks"} and len(stored) > 25
    nulls = {metric for metric, value in stored.items() if value is None}
    assert nulls == (set() if retain else {"forget_quality"})
    for metric in stored.keys() - nulls:
        assert summary[metric] == pytest.approx(stored[metric], rel=1e-6), metric


# --- of one text ---
def test_memorisation_and_membership_of_a_text() -> None:
    assert metrics.exact_memorization([True, False, True, True]) == 0.75

    assert metrics.extraction_strength([False, True, False, True, True]) == pytest.approx(0.4)  # after the first three
    assert metrics.extraction_strength([True, True]) == 1
    assert metrics.extraction_strength([True, True, True, False]) == 0
    assert metrics.extraction_strength([False, True, True, True]) == 0.75

    assert metrics.min_k([-1.0, -5.0, -2.0, -4.0, -3.0]) == 4.5  # int(0.4 * 5) = 2 of them
    assert metrics.min_k([-1.0, -5.0, -2.0, -4.0]) == 5  # int(0.4 * 4) = 1
    assert metrics.min_k([-3.0]) == 3  # never none
    # (-1 + 2) / 2 = 0.5, (-5 + 2) / sqrt(9) = -1; the lowest one of two counts
    assert metrics.min_k_plus_plus([-1.0, -5.0], [-2.0, -2.0], [4.0, 9.0]) == 1
    # A distribution without spread: sqrt(1e-6) in its place.
    assert metrics.min_k_plus_plus([-1.0], [-1.5], [0.0]) == pytest.approx(-500)

    # One byte: a header of 2, a fixed block of 3, a checksum of 4.
    assert metrics.zlib_score(1.8, "a") == pytest.approx(0.2)
    assert metrics.zlib_score(1.0, "a" * 1000) > metrics.zlib_score(1.0, "qwertyuiopasdfghjklzxcvbnm" * 38)


def test_probabilities_of_true_and_wrong_answers() -> None:
    # The wrong answers' mean loss is 2: e^-2 / e^-1.
    assert metrics.truth_ratio(1.0, [1.0, 3.0]) == pytest.approx(1 / math.e)
    assert metrics.closer_to_one([0.5, 2.0, 1.0]) == pytest.approx((0.5 + 0.5 + 1) / 3)
    assert metrics.true_better([0.25, 1.0, 3.0]) == 0.25  # (0.75 + 0 + 0) / 3
    assert metrics.truth_ratio(1000.0, [1.0]) < math.inf  # e^-1000 is 0
    assert metrics.normalised_probability(0.2, [0.1, 0.1]) == pytest.approx(0.5)
    assert metrics.normalised_probability(0.0, [0.0]) == 0


@pytest.mark.parametrize(
    ("generation", "truth", "rouge1_recall", "f1", "recall"),
    [
        ("The cat.", "the cat sat on", 0.5, 2 / 3, 0.5),  # precision 1, recall 1/2
        ("cat the", "the cats", 1.0, 0.5, 0.5),  # both words, stemmed; only one in order
        ("", "the cat", 0.0, 0.0, 0.0),
        ("?!", "the cat", 0.0, 0.0, 0.0),
        ("a dog", "the cat", 0.0, 0.0, 0.0),
    ],
)
def test_rouge(generation: str, truth: str, rouge1_recall: float, f1: float, recall: float) -> None:
    expected = {"rouge1_recall": rouge1_recall, "rougeL_f1": f1, "rougeL_recall": recall}
    assert metrics.rouge(generation, truth) == pytest.approx(expected)


@pytest.mark.parametrize(
    "text", ["Москва", "東京", "مرحبا بالعالم", "Zürich", "नई दिल्ली", "The cats sat, 7,391 of them."]
)
def test_rouge_in_any_script(text: str) -> None:
    """English is scored as published, and what is published counts no other letter."""
    assert set(metrics.rouge(text, text, any_script=True).values()) == {1.0}
    assert metrics.rouge("Z rich", "Zürich", any_script=True)["rougeL_recall"] == 0.0
    english = metrics.rouge("A cat sits.", "The cats sat, 7,391 of them.")
    assert metrics.rouge("A cat sits.", "The cats sat, 7,391 of them.", any_script=True) == english
    assert metrics.rouge("彼は東京で生まれた", "東京", any_script=True)["rougeL_recall"] == 1.0


def test_scores_of_a_row_of_logits() -> None:
    # p = 0, 1/4, 3/4: a token that is ruled out says nothing of the others.
    logits = torch.tensor([[-math.inf, 0.0, math.log(3)]] * 2)
    token, correct, mean, variance = _score_rows(logits, torch.tensor([1, 2]), None).T
    assert token.tolist() == pytest.approx([math.log(0.25), math.log(0.75)]) and correct.tolist() == [0, 1]
    assert mean.tolist() == pytest.approx([0.25 * math.log(0.25) + 0.75 * math.log(0.75)] * 2)
    assert variance.tolist() == pytest.approx([0.25 * 0.75 * math.log(3) ** 2] * 2)


# --- of a set ---
def test_forget_quality() -> None:
    assert metrics.forget_quality([0.1, 0.2, 0.3], [0.3, 0.2, 0.1]) == (1.0, 0.0)
    # Three values below three others: 2 of the C(6, 3) = 20 orders are as extreme.
    assert metrics.forget_quality([1, 2, 3], [4, 5, 6]) == pytest.approx((0.1, 1.0))


def test_model_utility_auc_and_privleak() -> None:
    assert metrics.model_utility([1.0] * 8 + [0.5]) == pytest.approx(0.9)  # the harmonic mean, 9 / (8 + 2)
    assert metrics.model_utility([1.0] * 8 + [0.0]) == 0

    # (1, 2) (1, 3) (2, 3) are in order, (2, 2) is a tie: 3.5 of 4.
    assert metrics.auc([1.0, 2.0], [2.0, 3.0]) == 0.875
    assert metrics.auc([1.0], [0.0]) == 0

    assert metrics.privleak(1.0) == pytest.approx(-100)
    assert metrics.privleak(0.3, 0.3) == 0
    assert metrics.privleak(0.2, 0.6) == pytest.approx(100)  # (0.8 - 0.4) / 0.4
    assert math.isfinite(metrics.privleak(0.5, 1.0))


# --- results ---
def scored(*values: float | None) -> dict[str, Any]:
    return {"agg_value": None, "value_by_index": {str(i): v and {"score": v} for i, v in enumerate(values)}}


def losses(*values: Any) -> dict[str, Any]:
    return {"agg_value": None, "value_by_index": {str(i): {"avg_loss": v} for i, v in enumerate(values)}}


def small_results() -> dict[str, Any]:
    return {
        "forget_Q_A_PARA_Prob": losses(1.0, 1.0, 1.0),
        "forget_Q_A_PERT_Prob": losses([1.0, 1.0], [2.0, 2.0], [1.0, 5.0]),
        "forget_truth_ratio": scored(9, 9, 9),
        "mia_min_k": {"agg_value": None, "forget": scored(1, 2), "holdout": scored(2, 3)},
        "exact_memorization": scored(0.5, None, 1.0),
    }


def test_summary_of_hand_made_results() -> None:
    results = small_results()
    summary = summarize(results)
    # Ratios 1, 1/e and 1/e^2.
    assert summary["forget_truth_ratio"] == pytest.approx((1 + math.exp(-1) + math.exp(-2)) / 3)
    assert summary["mia_min_k"] == 0.875
    assert summary["privleak"] == pytest.approx(-75)  # (0.125 - 0.5) / 0.5
    assert summary["exact_memorization"] == 0.75  # one example has no value
    assert summary["forget_quality"] is summary["forget_quality_ks"] is summary["model_utility"] is None
    retained = summarize(results, results)
    assert (retained["forget_quality"], retained["forget_quality_ks"], retained["privleak"]) == (1, 0, 0)
    # Truth ratios are taken as stored where losses are missing.
    retain = {"forget_truth_ratio": scored(0.9, 2.0, 3.0)}  # the model's: 1, 0.37, 0.14
    summary = summarize(results, retain)
    assert summary["forget_quality_ks"] == pytest.approx(2 / 3)
    assert summary["privleak"] is None  # without an attack on the retain model


def test_muse_entries_average_rouge_f1() -> None:
    values = {"0": {"rougeL_f1": 0.25, "rougeL_recall": 1.0}, "1": {"rougeL_f1": 0.75, "rougeL_recall": 1.0}}
    names = ("forget_verbmem_ROUGE", "forget_knowmem_ROUGE", "retain_knowmem_ROUGE", "forget_Q_A_ROUGE")
    summary = summarize({name: {"agg_value": None, "value_by_index": values} for name in names})
    assert summary == dict(zip(names, (0.5, 0.5, 0.5, 1.0), strict=True))


@pytest.mark.parametrize(
    ("key", "value", "name"),
    [
        ("split", "forget10", "forget split"),
        ("benchmark", "MUSE-News", "benchmark"),
        ("model", {"layers": 3}, "model"),
        ("tokenizer_vocabulary", 7, "tokenizer vocabulary"),
        ("data_sha256", "b", "evaluation data"),
    ],
)
def test_retain_results_that_do_not_fit_are_refused(key: str, value: Any, name: str) -> None:
    metadata = {"benchmark": "TOFU", "split": "forget05", "data_sha256": "a", "tokenizer_vocabulary": 8}
    metadata["model"] = {"layers": 2}
    results = small_results() | {"palu": metadata}
    assert summarize(results, results)["forget_quality"] == 1
    with pytest.raises(ValueError, match="retain_results do not fit") as error:
        summarize(results, small_results() | {"palu": metadata | {key: value}})
    assert f"their {name} is {value}, the model's is {metadata[key]}; " in str(error.value)


def test_retain_results_of_other_rows_are_refused() -> None:
    retain = small_results()
    for name in ("forget_Q_A_PARA_Prob", "forget_Q_A_PERT_Prob"):
        retain[name]["value_by_index"]["7"] = retain[name]["value_by_index"].pop("2")
    with pytest.raises(ValueError, match="has 3 examples, the model's 3 with other indices"):
        summarize(small_results(), retain)
    retain = small_results()
    retain["mia_min_k"]["holdout"] = scored(1)
    with pytest.raises(ValueError, match="mia_min_k of the holdout set has 1 examples, the model's 2"):
        summarize(small_results(), retain)
    with pytest.raises(ValueError, match="retain_results hold no forget_truth_ratio values; give the results of"):
        summarize(small_results(), {"exact_memorization": scored(1)})


def test_results_are_read_from_files(tmp_path: Path) -> None:
    text = json.dumps(small_results())
    plain, zipped, broken = (tmp_path / name for name in ("a.json", "b.json.gz", "c.json"))
    plain.write_text(text)
    zipped.write_bytes(gzip.compress(text.encode()))
    broken.write_text(text[:-9])
    assert summarize(str(plain)) == summarize(zipped) == summarize(small_results())
    with pytest.raises(ValueError, match=r"c\.json does not hold results"):
        summarize(broken)
    with pytest.raises(FileNotFoundError):
        summarize(tmp_path / "d.json")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    bare = runpy.run_path(metrics.__file__)  # scoring a model needs none of them
    with pytest.raises(ImportError, match=r"rouge_score.*pip install 'palu-unlearn\[evaluate\]'"):
        bare["require_packages"]()
    metrics.require_packages()
