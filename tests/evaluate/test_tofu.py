"""The TOFU evaluation on a tiny Llama: against plain padded passes, and on input that cannot be used."""

from __future__ import annotations

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
from helpers.benchmark_data import quick_tofu, small_tofu, tofu_rows
from helpers.logits import WatchLogits
from helpers.small_tokenizers import CHATML, LLAMA3, byte_level, sentencepiece
from helpers.tiny import overfit, same_weights, tiny_llama, weights
from tqdm import tqdm
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification
from transformers import PreTrainedTokenizerFast as Tokenizer

from palu.data.examples import load_retain
from palu.data.files import DataError
from palu.data.tokenize import IGNORE, Example
from palu.evaluate import TofuData, load_tofu, summarize, tofu
from palu.evaluate.scores import gradient_norms
from palu.models.generation import prompt_of

TOFU = Path(__file__).parents[3] / "shared" / "data" / "tofu"
TOKENIZERS = {
    "chat": lambda: byte_level(CHATML, bos=False),
    "llama3": lambda: byte_level(LLAMA3),
    "plain": sentencepiece,
}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return TOKENIZERS[request.param]()


def llama_for(tokenizer: Tokenizer, **config: Any) -> LlamaForCausalLM:
    return tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=512, **config)


def examples_of(rows: list[dict[str, Any]], tokenizer: Tokenizer, column: str = "answer") -> list[Example]:
    texts = [{"question": row["question"], "answer": row[column]} for row in rows]
    return load_retain(texts, tokenizer, max_length=10_000).examples


def values(entry: dict[str, Any], key: str = "score") -> list[float]:
    return [value[key] for value in entry["value_by_index"].values()]


def padded_log_probs(model: LlamaForCausalLM, examples: list[Example]) -> list[torch.Tensor]:
    """The textbook: [answer tokens, V] log-probabilities of each example, from one padded pass."""
    width = max(len(example.input_ids) for example in examples)
    ids = torch.zeros(len(examples), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    where = []
    for row, example in enumerate(examples):
        length = len(example.input_ids)
        ids[row, :length], mask[row, :length] = example.input_ids, 1
        where.append((example.labels != IGNORE).nonzero().squeeze(1) - 1)
    inputs = {"input_ids": ids, "attention_mask": mask}
    with torch.no_grad():
        logits = model(**{k: v.to(model.device) for k, v in inputs.items()}, use_cache=False).logits.cpu()
    return [logits[row, at].log_softmax(-1) for row, at in enumerate(where)]


# --- values ---
def test_values_are_those_of_a_plain_padded_pass(tokenizer: Tokenizer, device: torch.device) -> None:
    model, data = llama_for(tokenizer).to(device), small_tofu()
    results = quick_tofu(model, tokenizer, data)

    for name, of_set, column in (
        ("forget_Q_A_Prob", data.forget, "answer"),
        ("forget_Q_A_PARA_Prob", data.forget, "paraphrased_answer"),
        ("wf_Q_A_Prob", data.world_facts, "answer"),
    ):
        examples = examples_of(of_set, tokenizer, column)
        tokens = [example.labels[example.labels != IGNORE] for example in examples]
        log_p = padded_log_probs(model, examples)
        nll = [-float(lp.gather(1, t[:, None]).mean()) for lp, t in zip(log_p, tokens, strict=True)]
        assert values(results[name], "avg_loss") == pytest.approx(nll, rel=1e-4)
        assert values(results[name], "prob") == pytest.approx([math.exp(-x) for x in nll], rel=1e-4)
        if name != "forget_Q_A_Prob":
            continue
        # The last token, the end of sequence, does not count.
        for number, (lp, t) in enumerate(zip(log_p, tokens, strict=True)):
            lp, t = lp[:-1].double(), t[:-1]
            own = lp.gather(1, t[:, None]).squeeze(1)
            mu = (lp.exp() * lp).sum(1)
            sigma = ((lp.exp() * lp**2).sum(1) - mu**2).sqrt()
            lowest = int(0.4 * len(t))
            expected = {
                "min_k": -float(own.sort().values[:lowest].mean()),
                "min_k_plus_plus": -float(((own - mu) / sigma).sort().values[:lowest].mean()),
            }
            for attack, score in expected.items():
                found = results[f"mia_{attack}"]["forget"]["value_by_index"][str(number)]["score"]
                assert found == pytest.approx(score, rel=1e-3), attack
            share = float((lp.argmax(1) == t).double().mean())
            assert results["exact_memorization"]["value_by_index"][str(number)]["score"] == pytest.approx(share)


def test_truth_ratios_and_normalised_probabilities_are_of_the_right_answers() -> None:
    tokenizer, data = TOKENIZERS["chat"](), small_tofu()
    model = llama_for(tokenizer)
    results = quick_tofu(model, tokenizer, data)

    def nll(row: dict[str, Any], answer: str) -> float:
        (example,) = examples_of([row | {"answer": answer}], tokenizer)
        (log_p,) = padded_log_probs(model, [example])
        return -float(log_p.gather(1, example.labels[example.labels != IGNORE][:, None]).mean())

    row = data.forget[2]
    wrong = sum(nll(row, answer) for answer in row["perturbed_answer"]) / 3
    expected = math.exp(-wrong) / math.exp(-nll(row, row["paraphrased_answer"]))
    assert results["forget_truth_ratio"]["value_by_index"]["2"]["score"] == pytest.approx(expected, rel=1e-4)

    row = data.real_authors[3]
    wrong = sum(nll(row, answer) for answer in row["perturbed_answer"]) / 3
    right = math.exp(-nll(row, row["answer"]))
    assert results["ra_Truth_Ratio"]["value_by_index"]["3"]["score"] == pytest.approx(
        math.exp(-wrong) / right, rel=1e-4
    )
    others = sum(math.exp(-nll(row, answer)) for answer in row["perturbed_answer"])
    normalised = results["ra_Q_A_Prob_normalised"]["value_by_index"]["3"]["prob"]
    assert normalised == pytest.approx(right / (right + others), rel=1e-4)


def test_wrong_answers_may_differ_in_number() -> None:
    tokenizer, data = TOKENIZERS["chat"](), small_tofu()
    model = llama_for(tokenizer)
    whole = quick_tofu(model, tokenizer, data)["forget_Q_A_PERT_Prob"]["value_by_index"]
    del data.forget[1]["perturbed_answer"][2]
    fewer = quick_tofu(model, tokenizer, data)["forget_Q_A_PERT_Prob"]["value_by_index"]
    assert [len(value["prob"]) for value in fewer.values()] == [3, 2, 3, 3, 3]
    assert fewer["1"]["avg_loss"] == pytest.approx(whole["1"]["avg_loss"][:2], rel=1e-5)
    assert fewer["4"]["avg_loss"] == pytest.approx(whole["4"]["avg_loss"], rel=1e-5)


def test_results_do_not_depend_on_the_batch_size() -> None:
    tokenizer = TOKENIZERS["llama3"]()
    model = llama_for(tokenizer)
    one, many = (quick_tofu(model, tokenizer, batch_tokens=size) for size in (1, 10_000))
    first, second = ({k: v for k, v in summarize(r).items() if v is not None} for r in (one, many))
    assert first == pytest.approx(second, rel=1e-4)
    assert values(one["forget_truth_ratio"]) == pytest.approx(values(many["forget_truth_ratio"]), rel=1e-4)
    assert values(one["forget_Q_A_ROUGE"], "generation") == values(many["forget_Q_A_ROUGE"], "generation")


def test_gradient_norm_is_that_of_a_plain_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, data = TOKENIZERS["chat"](), small_tofu()
    model = llama_for(tokenizer)
    model.model.embed_tokens.weight.requires_grad_(False)  # frozen weights count too
    monkeypatch.setattr("palu.evaluate.scores.CHUNK_BYTES", 4 * 3 * len(tokenizer))
    results = quick_tofu(model, tokenizer, data, mia=["gradnorm"])
    with WatchLogits(len(tokenizer), model.config.hidden_size) as watched:
        gradient_norms(model, examples_of(data.forget, tokenizer), bar=tqdm(disable=True))
    assert watched.rows <= 3
    assert not model.model.embed_tokens.weight.requires_grad
    assert all(p.grad is None for p in model.parameters())

    model.requires_grad_(True)
    for number, example in enumerate(examples_of(data.forget, tokenizer)):
        log_p = model(input_ids=example.input_ids[None], use_cache=False).logits[0, :-1].log_softmax(-1)
        own = log_p.gather(1, example.input_ids[1:, None])[example.labels[1:] != IGNORE]
        model.zero_grad()
        (-own[:-1].mean()).backward()
        norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in model.parameters()))
        found = results["mia_gradnorm"]["forget"]["value_by_index"][str(number)]["score"]
        assert found == pytest.approx(norm, rel=1e-4)


def test_reference_attack_subtracts_the_reference_model() -> None:
    tokenizer = TOKENIZERS["chat"]()
    model, reference = llama_for(tokenizer), llama_for(tokenizer, seed=1)
    results = quick_tofu(model, tokenizer, reference_model=reference, mia=["loss", "reference"])
    theirs = quick_tofu(reference, tokenizer, mia=["loss"])
    for side in ("forget", "holdout"):
        ours, other = (values(r["mia_loss"][side]) for r in (results, theirs))
        expected = [a - b for a, b in zip(ours, other, strict=True)]
        assert values(results["mia_reference"][side]) == pytest.approx(expected, abs=1e-5)
    assert len(values(results["mia_reference"]["holdout"])) == 6


# --- generation ---
def test_generations_are_greedy_whatever_the_model_is_set_to(tokenizer: Tokenizer, device: torch.device) -> None:
    model, data = llama_for(tokenizer).to(device), small_tofu()
    settings = GenerationConfig(do_sample=True, temperature=5.0, repetition_penalty=9.0, max_length=3, num_beams=2)
    model.generation_config = settings
    results = quick_tofu(model, tokenizer, data, max_new_tokens=6)
    assert model.generation_config is settings

    examples = examples_of(data.retain, tokenizer)
    stop = {int(example.input_ids[-1]) for example in examples} | {tokenizer.eos_token_id}
    for number, example in enumerate(examples):
        ids = prompt_of(example).tolist()
        prompt = len(ids)
        with torch.no_grad():
            while len(ids) < prompt + 6:
                logits = model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[0, -1]
                ids.append(int(logits.argmax()))
                if ids[-1] in stop:
                    break
        expected = tokenizer.decode(ids[prompt:], skip_special_tokens=True).strip()
        assert results["retain_Q_A_ROUGE"]["value_by_index"][str(number)]["generation"] == expected


@pytest.fixture(scope="module", params=["chat", "plain"])
def recited(request: pytest.FixtureRequest) -> tuple[LlamaForCausalLM, Tokenizer, dict[str, Any]]:
    """A model that knows the forget answers by heart, its tokenizer, its results."""
    torch.manual_seed(0)
    tokenizer, data = TOKENIZERS[request.param](), small_tofu()
    model = llama_for(tokenizer)
    examples = examples_of(data.forget, tokenizer)
    overfit(model, [{"input_ids": e.input_ids.tolist(), "labels": e.labels.tolist()} for e in examples], steps=80)
    model.train()
    side = tokenizer.padding_side
    before = weights(model)
    results = quick_tofu(model, tokenizer, max_new_tokens=60)
    assert model.training and tokenizer.padding_side == side and same_weights(model, before)
    return model, tokenizer, results


def test_a_model_that_recites_is_found_out(recited: tuple[LlamaForCausalLM, Tokenizer, dict[str, Any]]) -> None:
    _, _, results = recited
    for number, row in enumerate(small_tofu().forget):
        found = results["forget_Q_A_ROUGE"]["value_by_index"][str(number)]
        assert found["generation"] == found["ground_truth"] == row["answer"]
    for name in ("forget_Q_A_ROUGE", "exact_memorization", "extraction_strength"):
        assert results[name]["agg_value"] == 1, name
    assert results["forget_Q_A_Prob"]["agg_value"] > 0.9
    assert results["retain_Q_A_Prob"]["agg_value"] < 0.9
    for attack in ("loss", "zlib", "min_k"):
        assert results[f"mia_{attack}"]["auc"] == results[f"mia_{attack}"]["agg_value"] > 0.9
    assert results["privleak"]["agg_value"] < -80


def test_results_survive_json_and_serve_as_retain_results(
    recited: tuple[LlamaForCausalLM, Tokenizer, dict[str, Any]], tmp_path: Path
) -> None:
    model, tokenizer, results = recited
    text = json.dumps(results, allow_nan=False)
    assert json.loads(text) == results
    path = tmp_path / "retain.json.gz"
    path.write_bytes(gzip.compress(text.encode()))
    again = quick_tofu(model, tokenizer, retain_results=path)
    assert again["forget_quality"]["agg_value"] == 1 and again["forget_quality_ks"]["agg_value"] == 0
    assert again["privleak"]["agg_value"] == 0
    summary = summarize(again, results)
    assert summary == {name: entry["agg_value"] for name, entry in again.items() if name != "palu"}
    assert again["palu"]["examples"]["holdout"] == 6 and again["palu"]["model"]["layers"] == 2

    other = quick_tofu(llama_for(tokenizer, seed=3), tokenizer, retain_results=results)
    assert other["forget_quality"]["agg_value"] < 1 and other["forget_quality_ks"]["agg_value"] > 0


# --- nulls ---
def test_nulls_have_a_reason() -> None:
    tokenizer, data = TOKENIZERS["chat"](), small_tofu()
    data = dataclasses.replace(data, world_facts=[], holdout=[])
    results = quick_tofu(llama_for(tokenizer), tokenizer, data)
    nulls = {name: entry for name, entry in results.items() if name != "palu" and entry["agg_value"] is None}
    reasons = {name: entry["reason"] for name, entry in nulls.items()}
    attacks = ("loss", "zlib", "reference", "gradnorm", "min_k", "min_k_plus_plus")
    assert {name for name, reason in reasons.items() if reason == "no holdout rows were given"} == {
        "privleak",
        *(f"mia_{attack}" for attack in attacks),
    }
    facts = {name for name, reason in reasons.items() if reason == "there are no world_facts rows"}
    assert facts == {"model_utility", *(name for name in results if name.startswith("wf_"))} and len(facts) == 6
    assert "retain_results" in reasons["forget_quality"] and "retain_results" in reasons["forget_quality_ks"]
    assert "fluency_model" in reasons["forget_fluency"]
    assert reasons["forget_rep_4"] == reasons["retain_rep_4"] == "no generation has 4 words"
    assert len(nulls) == 7 + 6 + 3 + 2
    assert summarize(results) == {name: entry["agg_value"] for name, entry in results.items() if name != "palu"}


def test_attacks_that_are_left_out() -> None:
    tokenizer = TOKENIZERS["chat"]()
    model = llama_for(tokenizer)
    results = quick_tofu(model, tokenizer, mia=["loss", "reference"])
    assert {name for name in results if name.startswith("mia_")} == {"mia_loss", "mia_reference"}
    assert "no reference_model" in results["mia_reference"]["reason"]
    assert "min_k" in results["privleak"]["reason"]
    retained = quick_tofu(model, tokenizer, retain_results=results)
    assert "retain_results hold no mia_min_k" in retained["privleak"]["reason"]


# --- fluency ---
class Verdicts:
    """A pipeline of a random classifier of two labels."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.tokenizer = byte_level()
        self.tokenizer.pad_token = self.tokenizer.eos_token
        config = LlamaConfig(
            vocab_size=len(self.tokenizer),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            initializer_range=0.5,
            pad_token_id=self.tokenizer.pad_token_id,
            id2label={0: "Clean", 1: "noise"},
            label2id={"Clean": 0, "noise": 1},
        )
        self.model = LlamaForSequenceClassification(config).eval()

    def fluent(self, text: str) -> bool:
        with torch.no_grad():
            logits = self.model(**self.tokenizer(text, return_tensors="pt")).logits
        return int(logits.argmax()) == 0


def test_fluency_is_the_share_of_clean_generations(tmp_path: Path) -> None:
    tokenizer, verdicts = TOKENIZERS["chat"](), Verdicts()
    model, data = llama_for(tokenizer), dataclasses.replace(small_tofu(), forget=tofu_rows("forget", 12))
    results = quick_tofu(model, tokenizer, data, fluency_model=verdicts, mia=[])
    generations = values(results["forget_Q_A_ROUGE"], "generation")
    expected = [float(bool(text) and verdicts.fluent(text)) for text in generations]
    assert values(results["forget_fluency"]) == expected
    assert results["forget_fluency"]["agg_value"] == pytest.approx(sum(expected) / 12)
    assert 0 < sum(expected) < 12  # else the test would not tell

    verdicts.model.save_pretrained(tmp_path)
    verdicts.tokenizer.save_pretrained(tmp_path)
    for source in (tmp_path, LlamaForSequenceClassification.from_pretrained(tmp_path)):
        loaded = quick_tofu(model, tokenizer, data, fluency_model=source, fluency_label="NOISE", mia=[])
        noise = [float(bool(text) and not fluent) for text, fluent in zip(generations, expected, strict=True)]
        assert values(loaded["forget_fluency"]) == noise


def test_empty_generations_score_nothing() -> None:
    tokenizer = TOKENIZERS["chat"]()
    model = llama_for(tokenizer, tie_word_embeddings=False)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    with torch.no_grad():  # the head says nothing but the end of the answer
        model.lm_head = torch.nn.Linear(32, len(tokenizer), bias=True)
        model.lm_head.weight.zero_()
        model.lm_head.bias.zero_()[end] = 9.0
    results = quick_tofu(model, tokenizer, fluency_model=Verdicts())
    assert set(values(results["forget_Q_A_ROUGE"], "generation")) == {""}
    assert results["forget_Q_A_ROUGE"]["agg_value"] == results["forget_fluency"]["agg_value"] == 0
    assert results["model_utility"]["agg_value"] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fluency_label": "fine"}, "no label 'fine'; give fluency_label as one of Clean, noise"),
        ({"fluency_model": torch.nn.Linear(1, 1)}, "a Linear without a tokenizer; give a name, a path or"),
    ],
)
def test_classifiers_that_cannot_be_used(change: dict[str, Any], message: str) -> None:
    tokenizer = TOKENIZERS["chat"]()
    with pytest.raises(ValueError, match=message):
        quick_tofu(llama_for(tokenizer), tokenizer, **({"fluency_model": Verdicts()} | change))


# --- input that cannot be used ---
@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("forget", {"paraphrased_answer": None}, "forget row 1: column 'paraphrased_answer' is missing; fill it in"),
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


def test_answers_that_cannot_be_tokenised_are_named() -> None:
    tokenizer, data = TOKENIZERS["chat"](), small_tofu()
    data.retain[2]["perturbed_answer"][1] = "half a pair: \ud800"
    with pytest.raises(DataError, match=r"^retain row 2 \(perturbed_answer\): .*surrogate"):
        quick_tofu(llama_for(tokenizer), tokenizer, data)


def test_arguments_that_cannot_be_used(tmp_path: Path) -> None:
    tokenizer = TOKENIZERS["chat"]()
    model = llama_for(tokenizer)
    with pytest.raises(FileNotFoundError, match=r"holds no forget\*\.jsonl"):
        tofu(model, tokenizer, "forget05", tmp_path)
    with pytest.raises(DataError, match="holdout row 0: a row must map column names to values, got str"):
        quick_tofu(model, tokenizer, holdout=["a text"])
    with pytest.raises(ValueError, match=r"tokenizer has \d+ tokens and model a vocabulary of 97; load the tokenizer"):
        quick_tofu(tiny_llama(), tokenizer)
    with pytest.raises(ValueError, match="reference_model a vocabulary of 97"):
        quick_tofu(model, tokenizer, reference_model=tiny_llama())


def test_broken_models_are_told_from_bad_ones() -> None:
    tokenizer = TOKENIZERS["chat"]()
    model = llama_for(tokenizer)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(ValueError, match=r"gives \w+ row \d+ \(\w+\) log-probabilities that are not finite"):
        quick_tofu(model, tokenizer)
    assert not model.training


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1, "num_hidden_layers": 3}, "their model is .*'layers': 2.*; train the retain model from the same"),
        ({}, "their evaluation data is"),
    ],
)
def test_retain_results_that_do_not_fit_are_refused_before_the_work(
    change: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, data = TOKENIZERS["chat"](), small_tofu()
    retain = quick_tofu(llama_for(tokenizer), tokenizer, data)
    monkeypatch.setattr(sys.modules["palu.evaluate.tofu"], "token_scores", None)  # would fail if it were called
    if not change:
        data.forget[0]["answer"] = "Another answer."
    with pytest.raises(ValueError, match=message):
        quick_tofu(llama_for(tokenizer, **change), tokenizer, data, retain_results=retain)
    del retain["palu"]  # as a log of open-unlearning's
    with pytest.raises(ValueError, match=r"has 5 examples, the model's 4; .*another split"):
        quick_tofu(llama_for(tokenizer), tokenizer, TofuData(tofu_rows("forget", 4)), retain_results=retain)


# --- loading ---
def write_folder(folder: Path) -> TofuData:
    data = small_tofu()
    names = {"forget": "forget05", "retain": "retain_perturbed", "holdout": "holdout05"}
    for one in dataclasses.fields(data):
        lines = [json.dumps(row) for row in getattr(data, one.name)]
        (folder / f"{names.get(one.name, one.name)}.jsonl").write_text("\n".join(lines) + "\n")
    return data


def test_folders_and_public_names_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_folder(tmp_path)
    assert load_tofu("forget05", tmp_path) == data
    with pytest.raises(ValueError, match=r"no forget split 'forget10'; .* has forget05"):
        load_tofu("forget10", tmp_path)
    (tmp_path / "holdout05.jsonl").unlink()
    assert load_tofu("forget05", str(tmp_path)).holdout == []
    (tmp_path / "world_facts.jsonl").write_text("{")
    with pytest.raises(DataError, match=r"world_facts\.jsonl is not JSON .*; download it again"):
        load_tofu("forget05", tmp_path)

    sets = {
        "forget10_perturbed": data.forget,
        "retain_perturbed": data.retain,
        "real_authors_perturbed": data.real_authors,
        "world_facts_perturbed": data.world_facts,
        "holdout10": data.holdout,
    }

    def load_dataset(name: str, config: str, split: str) -> list[dict[str, Any]]:
        assert (name, split) == ("locuslab/TOFU", "train")
        return sets[config]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert load_tofu("forget10") == data
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"by name needs datasets .*pip install 'palu-unlearn\[evaluate\]'"):
        load_tofu("forget10")


def test_given_holdout_rows_replace_the_datas() -> None:
    tokenizer = TOKENIZERS["chat"]()
    results = quick_tofu(llama_for(tokenizer), tokenizer, holdout=tofu_rows("unseen", 3))
    assert len(values(results["mia_loss"]["holdout"])) == 3


@pytest.mark.skipif(not TOFU.is_dir(), reason="needs TOFU in ../shared")
@pytest.mark.parametrize(("split", "count"), [("forget01", 40), ("forget05", 200), ("forget10", 400)])
def test_tofu_itself_is_usable(split: str, count: int) -> None:
    data = load_tofu(split, TOFU)
    sizes = [len(getattr(data, one.name)) for one in dataclasses.fields(data)]
    assert sizes == [count, 400, 100, 117, 0]
