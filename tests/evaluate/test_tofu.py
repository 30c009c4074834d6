"""The TOFU evaluation on a tiny Llama: against plain padded passes, and on input that cannot be used."""

from __future__ import annotations

import copy
import dataclasses
import gzip
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.benchmark_data import greedy, llama_for, plain_pass, quick_tofu, small_tofu, tofu_rows
from helpers.small_tokenizers import CHATML, LLAMA3, byte_level, sentencepiece
from helpers.tiny import overfit, same_weights, weights
from transformers import GenerationConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast as Tokenizer

from palu.data.examples import load_retain
from palu.data.files import DataError
from palu.data.tokenize import Example
from palu.evaluate import TofuData, load_tofu, summarize, tofu
from palu.models.generation import prompt_of

Loaded = tuple[LlamaForCausalLM, Tokenizer]

TOFU = Path(__file__).parents[3] / "shared" / "data" / "tofu"
TOKENIZERS = {
    "chat": lambda: byte_level(CHATML, bos=False),
    "llama3": lambda: byte_level(LLAMA3),
    "plain": sentencepiece,
}


@pytest.fixture(params=TOKENIZERS.values(), ids=list(TOKENIZERS))
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return request.param()


@pytest.fixture(scope="module")
def chat() -> Loaded:
    """A model, which no test changes, and its tokenizer, which has a chat template."""
    tokenizer = TOKENIZERS["chat"]()
    return llama_for(tokenizer), tokenizer


@pytest.fixture(scope="module")
def found(chat: Loaded) -> dict[str, Any]:
    """The results of that model on the small TOFU."""
    return quick_tofu(*chat)


def examples_of(rows: list[dict[str, Any]], tokenizer: Tokenizer, column: str = "answer") -> list[Example]:
    texts = [{"question": row["question"], "answer": row[column]} for row in rows]
    return load_retain(texts, tokenizer, max_length=10_000).examples


def values(entry: dict[str, Any], key: str = "score") -> list[float]:
    return [value[key] for value in entry["value_by_index"].values()]


def plain_nll(model: LlamaForCausalLM, example: Example) -> float:
    log_p, tokens = plain_pass(model, example)
    return -log_p.gather(1, tokens[:, None]).mean().item()


# --- values ---
def test_values_are_those_of_a_plain_pass(tokenizer: Tokenizer, device: torch.device) -> None:
    model, data = llama_for(tokenizer).to(device), small_tofu()
    results = quick_tofu(model, tokenizer, data)

    for name, of_set, column in (
        ("forget_Q_A_Prob", data.forget, "answer"),
        ("forget_Q_A_PARA_Prob", data.forget, "paraphrased_answer"),
        ("wf_Q_A_Prob", data.world_facts, "answer"),
    ):
        nll = [plain_nll(model, example) for example in examples_of(of_set, tokenizer, column)]
        assert values(results[name], "avg_loss") == pytest.approx(nll, rel=1e-4)
        assert values(results[name], "prob") == pytest.approx([math.exp(-x) for x in nll], rel=1e-4)

    for number, example in enumerate(examples_of(data.forget, tokenizer)):
        log_p, tokens = plain_pass(model, example)
        log_p, tokens = log_p[:-1].detach().double(), tokens[:-1]  # the end of sequence does not count
        own = log_p.gather(1, tokens[:, None]).squeeze(1)
        mu = (log_p.exp() * log_p).sum(1)
        sigma = ((log_p.exp() * log_p**2).sum(1) - mu**2).sqrt()
        lowest = int(0.4 * len(tokens))
        expected = {
            "min_k": -float(own.sort().values[:lowest].mean()),
            "min_k_plus_plus": -float(((own - mu) / sigma).sort().values[:lowest].mean()),
        }
        for attack, score in expected.items():
            assert values(results[f"mia_{attack}"]["forget"])[number] == pytest.approx(score, rel=1e-3), attack
        share = float((log_p.argmax(1) == tokens).double().mean())
        assert values(results["exact_memorization"])[number] == pytest.approx(share)

    # Truth ratios and normalised probabilities are of the right answers.
    def nll(row: dict[str, Any], answer: str) -> float:
        (example,) = examples_of([row | {"answer": answer}], tokenizer)
        return plain_nll(model, example)

    row = data.forget[2]
    wrong = sum(nll(row, answer) for answer in row["perturbed_answer"]) / 3
    expected = math.exp(-wrong) / math.exp(-nll(row, row["paraphrased_answer"]))
    assert values(results["forget_truth_ratio"])[2] == pytest.approx(expected, rel=1e-4)

    row = data.real_authors[3]
    each = [nll(row, answer) for answer in row["perturbed_answer"]]
    right = math.exp(-nll(row, row["answer"]))
    assert values(results["ra_Truth_Ratio"])[3] == pytest.approx(math.exp(-sum(each) / 3) / right, rel=1e-4)
    normalised = values(results["ra_Q_A_Prob_normalised"], "prob")[3]
    assert normalised == pytest.approx(right / (right + sum(math.exp(-x) for x in each)), rel=1e-4)


def test_wrong_answers_may_differ_in_number(chat: Loaded, found: dict[str, Any]) -> None:
    data = small_tofu()
    whole = values(found["forget_Q_A_PERT_Prob"], "avg_loss")
    del data.forget[1]["perturbed_answer"][2]
    fewer = values(quick_tofu(*chat, data)["forget_Q_A_PERT_Prob"], "avg_loss")
    assert [len(losses) for losses in fewer] == [3, 2, 3, 3, 3]
    assert fewer[1] == pytest.approx(whole[1][:2], rel=1e-5)
    assert fewer[4] == pytest.approx(whole[4], rel=1e-5)


def test_results_do_not_depend_on_the_batch_size(chat: Loaded, found: dict[str, Any]) -> None:
    one = quick_tofu(*chat, batch_tokens=1)
    first, second = ({k: v for k, v in summarize(r).items() if v is not None} for r in (one, found))
    assert first == pytest.approx(second, rel=1e-4)
    assert values(one["forget_truth_ratio"]) == pytest.approx(values(found["forget_truth_ratio"]), rel=1e-4)
    assert values(one["forget_Q_A_ROUGE"], "generation") == values(found["forget_Q_A_ROUGE"], "generation")


# --- generation ---
def test_generations_are_greedy_whatever_the_model_is_set_to(tokenizer: Tokenizer, device: torch.device) -> None:
    model, data = llama_for(tokenizer).to(device), small_tofu()
    settings = GenerationConfig(do_sample=True, temperature=5.0, repetition_penalty=9.0, max_length=3, num_beams=2)
    model.generation_config = settings
    results = quick_tofu(model, tokenizer, data, max_new_tokens=6)
    assert model.generation_config is settings

    examples = examples_of(data.retain, tokenizer)
    stop = {int(example.input_ids[-1]) for example in examples} | {tokenizer.eos_token_id}
    expected = [greedy(model, tokenizer, prompt_of(example).tolist(), 6, stop).strip() for example in examples]
    assert values(results["retain_Q_A_ROUGE"], "generation") == expected


def test_a_model_that_recites_is_found_out_and_its_results_serve_as_retain_results(tmp_path: Path) -> None:
    tokenizer, data = TOKENIZERS["plain"](), small_tofu()
    model = llama_for(tokenizer)
    examples = examples_of(data.forget, tokenizer)
    overfit(model, [{"input_ids": e.input_ids.tolist(), "labels": e.labels.tolist()} for e in examples], steps=80)
    model.train()
    side, before = tokenizer.padding_side, weights(model)
    results = quick_tofu(model, tokenizer, max_new_tokens=60)
    assert model.training and tokenizer.padding_side == side and same_weights(model, before)

    found = results["forget_Q_A_ROUGE"]
    answers = [row["answer"] for row in data.forget]
    assert values(found, "generation") == values(found, "ground_truth") == answers
    for name in ("forget_Q_A_ROUGE", "exact_memorization", "extraction_strength"):
        assert results[name]["agg_value"] == 1, name
    assert results["retain_Q_A_Prob"]["agg_value"] < 0.9 < results["forget_Q_A_Prob"]["agg_value"]
    for attack in ("loss", "zlib", "min_k"):
        assert results[f"mia_{attack}"]["auc"] == results[f"mia_{attack}"]["agg_value"] > 0.9
    assert results["privleak"]["agg_value"] < -80

    text = json.dumps(results, allow_nan=False)
    assert json.loads(text) == results
    path = tmp_path / "retain.json.gz"
    path.write_bytes(gzip.compress(text.encode()))
    again = quick_tofu(model, tokenizer, retain_results=path)
    assert again["forget_quality"]["agg_value"] == 1 and again["forget_quality_ks"]["agg_value"] == 0
    assert again["privleak"]["agg_value"] == 0
    assert summarize(again, results) == {name: one["agg_value"] for name, one in again.items() if name != "palu"}
    assert again["palu"]["examples"]["holdout"] == 6 and again["palu"]["model"]["layers"] == 2

    other = quick_tofu(llama_for(tokenizer, seed=3), tokenizer, retain_results=results)
    assert other["forget_quality"]["agg_value"] < 1 and other["forget_quality_ks"]["agg_value"] > 0


# --- nulls ---
def test_nulls_have_a_reason(chat: Loaded) -> None:
    results = quick_tofu(*chat, dataclasses.replace(small_tofu(), world_facts=[], holdout=[]))
    aggregates = {name: entry["agg_value"] for name, entry in results.items() if name != "palu"}
    reasons = {name: results[name]["reason"] for name, value in aggregates.items() if value is None}
    attacks = ("loss", "zlib", "min_k", "min_k_plus_plus")
    assert {name for name, reason in reasons.items() if reason == "no holdout rows were given"} == {
        "privleak",
        *(f"mia_{attack}" for attack in attacks),
    }
    facts = {name for name, reason in reasons.items() if reason == "there are no world_facts rows"}
    assert facts == {"model_utility", *(name for name in results if name.startswith("wf_"))} and len(facts) == 6
    assert "retain_results" in reasons["forget_quality"] and "retain_results" in reasons["forget_quality_ks"]
    assert reasons["forget_rep_4"] == reasons["retain_rep_4"] == "no generation has 4 words"
    assert len(reasons) == 5 + 6 + 2 + 2
    assert summarize(results) == aggregates


def test_empty_generations_score_nothing() -> None:
    tokenizer = TOKENIZERS["chat"]()
    model = llama_for(tokenizer, tie_word_embeddings=False)
    with torch.no_grad():  # the head says nothing but the end of the answer
        model.lm_head = torch.nn.Linear(32, len(tokenizer), bias=True)
        model.lm_head.weight.zero_()
        model.lm_head.bias.zero_()[tokenizer.convert_tokens_to_ids("<|im_end|>")] = 9.0
    results = quick_tofu(model, tokenizer)
    assert set(values(results["forget_Q_A_ROUGE"], "generation")) == {""}
    for name in ("forget_Q_A_ROUGE", "model_utility"):
        assert results[name]["agg_value"] == 0


# --- input that cannot be used ---
@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("forget", {"paraphrased_answer": None}, "forget row 1: column 'paraphrased_answer'"),
        ("world_facts", {"perturbed_answer": []}, "world_facts row 1: column 'perturbed_answer' must be a list of one"),
        ("forget", {"perturbed_answer": ["a", " "]}, "forget row 1: column 'perturbed_answer' holds a blank"),
        ("holdout", {"answer": 3}, "holdout row 1: column 'answer' holds a blank or something else than text"),
    ],
)
def test_rows_that_cannot_be_used(name: str, change: dict[str, Any], message: str) -> None:
    data = small_tofu()
    of_set = getattr(data, name)
    of_set[1] = {key: value for key, value in (of_set[1] | change).items() if value is not None}
    with pytest.raises(DataError, match=message):
        load_tofu("forget05", data)


def test_arguments_that_cannot_be_used(chat: Loaded, tmp_path: Path) -> None:
    data = small_tofu()
    with pytest.raises(FileNotFoundError, match=r"holds no forget\*\.jsonl"):
        tofu(*chat, "forget05", tmp_path)
    with pytest.raises(DataError, match="holdout row 0: a row must map column names to values, got str"):
        quick_tofu(*chat, dataclasses.replace(data, holdout=["a text"]))
    data.retain[2]["perturbed_answer"][1] = "half a pair: \ud800"
    with pytest.raises(DataError, match=r"^retain row 2 \(perturbed_answer\): .*surrogate"):
        quick_tofu(*chat, data)
    broken = copy.deepcopy(chat[0])
    with torch.no_grad():
        broken.model.norm.weight[0] = float("nan")
    with pytest.raises(ValueError, match=r"gives \w+ row \d+ \(\w+\) log-probabilities that are not finite"):
        quick_tofu(broken, chat[1])
    assert not broken.training


def test_retain_results_that_do_not_fit_are_refused_before_the_work(
    chat: Loaded, found: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    retain = dict(found)
    monkeypatch.setattr(sys.modules["palu.evaluate.tofu"], "token_scores", None)  # would fail if it were called
    with pytest.raises(ValueError, match=r"their model is .*'layers': 2"):
        quick_tofu(llama_for(chat[1], num_hidden_layers=3), chat[1], retain_results=retain)
    del retain["palu"]  # as a log of open-unlearning's
    with pytest.raises(ValueError, match=r"has 5 examples, the model's 4; .*another split"):
        quick_tofu(*chat, TofuData(tofu_rows("forget", 4)), retain_results=retain)


# --- loading ---
def test_folders_and_public_names_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = small_tofu()
    files = ("forget05", "retain_perturbed", "real_authors", "world_facts", "holdout05")
    for rows, file in zip(vars(data).values(), files, strict=True):
        (tmp_path / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert load_tofu("forget05", tmp_path) == data
    with pytest.raises(ValueError, match=r"no forget split 'forget10'; .* has forget05"):
        load_tofu("forget10", tmp_path)
    (tmp_path / "holdout05.jsonl").unlink()
    assert load_tofu("forget05", str(tmp_path)).holdout == []
    (tmp_path / "world_facts.jsonl").write_text("{")
    with pytest.raises(DataError, match=r"line 1 of .*world_facts\.jsonl: not JSON"):
        load_tofu("forget05", tmp_path)

    configs = {"forget10_perturbed": "forget", "holdout10": "holdout"}
    configs |= {f"{name}_perturbed": name for name in ("retain", "real_authors", "world_facts")}

    def load_dataset(name: str, config: str, split: str) -> list[dict[str, Any]]:
        assert (name, split) == ("locuslab/TOFU", "train")
        return getattr(data, configs[config])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert load_tofu("forget10") == data
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"by name needs datasets .*pip install 'palu-unlearn\[evaluate\]'"):
        load_tofu("forget10")


@pytest.mark.skipif(not TOFU.is_dir(), reason="needs TOFU in ../shared")
@pytest.mark.parametrize(("split", "count"), [("forget01", 40), ("forget05", 200), ("forget10", 400)])
def test_tofu_itself_is_usable(split: str, count: int) -> None:
    sizes = [len(rows) for rows in vars(load_tofu(split, TOFU)).values()]
    assert sizes == [count, 400, 100, 117, 0]
