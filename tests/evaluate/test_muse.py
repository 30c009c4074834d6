"""The MUSE evaluation on a tiny Llama."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.benchmark_data import greedy, llama_for, small_muse
from helpers.small_tokenizers import CHATML, byte_level, sentencepiece
from helpers.tiny import overfit

from palu.data.files import DataError
from palu.evaluate import load_muse, muse, summarize
from palu.evaluate.language import FIGURES

MUSE = Path(__file__).parents[3] / "shared" / "data" / "muse_news"
TOKENIZERS = {"chat": lambda: byte_level(CHATML, bos=False), "plain": lambda: sentencepiece(eos=True)}


@pytest.fixture(scope="module")
def chat() -> tuple[Any, Any]:
    """A model, which no test changes, and its tokenizer, which has a chat template."""
    tokenizer = TOKENIZERS["chat"]()
    return llama_for(tokenizer), tokenizer


def quick(model: Any, tokenizer: Any, data: Any = None, **settings: Any) -> dict[str, Any]:
    return muse(model, tokenizer, data=small_muse() if data is None else data, progress=False, **settings)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_texts_are_continued_and_questions_asked_as_they_should_be(kind: str) -> None:
    tokenizer, data = TOKENIZERS[kind](), small_muse()
    model = llama_for(tokenizer)
    results = quick(model, tokenizer, verbmem_tokens=7, knowmem_tokens=5)
    eos = tokenizer.eos_token_id

    for i, row in enumerate(data["verbmem_forget"]):  # raw, whatever the template
        ids = [token for token in tokenizer(row["prompt"])["input_ids"] if token != eos]
        found = results["forget_verbmem_ROUGE"]["value_by_index"][str(i)]
        assert found["generation"] == greedy(model, tokenizer, ids, 7, {eos}).strip()
        assert found["ground_truth"] == row["gt"]

    shots = data["knowmem_retain_qa_icl"]
    for i, row in enumerate(data["knowmem_retain_qa"]):
        if kind == "chat":
            turns = [
                {"role": role, "content": one[column]}
                for one in (*shots, row)
                for role, column in (("user", "question"), ("assistant", "answer"))
            ][:-1]
            text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            ids, stop = tokenizer(text)["input_ids"], {eos, tokenizer.convert_tokens_to_ids("<|im_end|>")}
        else:
            text = "".join(f"Question: {one['question']}\nAnswer: {one['answer']}\n\n" for one in shots)
            # The blank before the answer is part of the answer's first token.
            ids = tokenizer(f"{text}Question: {row['question']}\nAnswer:")["input_ids"][:-1]
            stop = {eos}
        expected = greedy(model, tokenizer, ids, 5, stop).split("\n")[0].strip()
        assert results["retain_knowmem_ROUGE"]["value_by_index"][str(i)]["generation"] == expected


def test_privleak_is_of_min_k_over_the_raw_texts(chat: tuple[Any, Any]) -> None:
    (model, tokenizer), data = chat, small_muse()
    results = quick(model, tokenizer, max_length=20, batch_tokens=50)
    for i, text in enumerate(data["privleak_forget"]):
        ids = torch.tensor(tokenizer(text)["input_ids"][:20])
        with torch.no_grad():
            log_p = model(input_ids=ids[None], use_cache=False).logits[0, :-1].log_softmax(-1)
        own = log_p.gather(1, ids[1:, None]).squeeze(1)[:-1]  # 19 predictions, the last one left out
        expected = -float(own.sort().values[:7].mean())  # int(0.4 * 18)
        found = results["mia_min_k"]["forget"]["value_by_index"][str(i)]["score"]
        assert found == pytest.approx(expected, rel=1e-4)
    auc = results["mia_min_k"]["agg_value"]
    assert results["privleak"]["agg_value"] == pytest.approx(100 * (0.5 - auc) / 0.5)  # no retain model: 0.5


def test_a_model_that_recites_is_found_out(chat: tuple[Any, Any]) -> None:
    (model, tokenizer), data = copy.deepcopy(chat), small_muse()
    texts = [f"{row['prompt']} {row['gt']}" for row in data["verbmem_forget"]] + data["privleak_forget"]
    ids = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]
    overfit(model, [{"input_ids": one, "labels": one} for one in ids], steps=80)
    results = quick(model, tokenizer)
    assert results["forget_verbmem_ROUGE"]["agg_value"] > 0.9
    assert results["mia_min_k"]["auc"] > 0.9 and results["privleak"]["agg_value"] < -80
    assert results["retain_knowmem_ROUGE"]["agg_value"] < 0.5


def test_results_survive_json_and_serve_as_retain_results(tmp_path: Path) -> None:
    tokenizer = TOKENIZERS["plain"]()
    model = llama_for(tokenizer).train()
    results = quick(model, tokenizer)
    assert model.training
    (tmp_path / "retain.json").write_text(json.dumps(results, allow_nan=False))
    again = quick(model, tokenizer, retain_results=tmp_path / "retain.json")
    assert again["privleak"]["agg_value"] == 0
    assert summarize(again, results) == {name: one["agg_value"] for name, one in again.items() if name != "palu"}
    assert all(again[f"{name}_no_word"]["agg_value"] > 0.2 for name in ("forget_verbmem", "retain_knowmem"))
    assert set(again) == {
        *("forget_verbmem_ROUGE", "forget_knowmem_ROUGE", "retain_knowmem_ROUGE"),
        *("mia_min_k", "privleak", "palu"),
        *(f"{name}_{figure}" for name in ("forget_verbmem", "forget_knowmem", "retain_knowmem") for figure in FIGURES),
    }

    del results["mia_min_k"]
    assert "no mia_min_k" in quick(model, tokenizer, retain_results=results)["privleak"]["reason"]
    with pytest.raises(ValueError, match="their benchmark is MUSE-News, the model's is MUSE-Books"):
        quick(model, tokenizer, corpus="books", retain_results=results)


def test_input_that_cannot_be_used(chat: tuple[Any, Any]) -> None:
    model, tokenizer = copy.deepcopy(chat)
    for change, message in (
        ({"verbmem_forget": [{"prompt": "a"}]}, "verbmem_forget row 0: column 'gt' is missing"),
        ({"knowmem_retain_qa": ["a"]}, "knowmem_retain_qa row 0: column 'question' is missing"),
        ({"privleak_holdout": ["The cat sat", "a"]}, "privleak_holdout row 1: 1 tokens cannot be scored; give a lon"),
    ):
        with pytest.raises(DataError, match=message):
            quick(model, tokenizer, small_muse() | change)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"gives privleak_forget row \d+ log-probabilities that are not finite"):
        quick(model, tokenizer)


@pytest.mark.parametrize("corpus", ["News", "Books"])
def test_folders_and_public_names_are_read(corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, rows in small_muse().items():
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    data = load_muse(corpus.lower(), tmp_path)
    assert data == load_muse(corpus.lower(), small_muse()) and data["privleak_forget"][0].keys() == {"text"}

    def load_dataset(name: str, config: str, split: str) -> list[Any]:
        assert name == f"muse-bench/MUSE-{corpus}"
        return data[f"{config}_{split}"]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert load_muse(corpus.lower()) == data
    (tmp_path / "privleak_forget.json").unlink()
    with pytest.raises(FileNotFoundError):
        load_muse(corpus.lower(), tmp_path)
    with pytest.raises(ValueError, match=f"there is no corpus '{corpus}'; MUSE has news, books"):
        load_muse(corpus)


@pytest.mark.skipif(not MUSE.is_dir(), reason="needs MUSE-News in ../shared")
def test_muse_news_itself_is_usable() -> None:
    assert [len(rows) for rows in load_muse(data=MUSE).values()] == [100, 100, 10, 100, 10, 100, 100]
