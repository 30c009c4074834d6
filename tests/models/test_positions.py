"""Models with a table of positions: max_length is clamped to it, and nothing reads beyond it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.benchmark_data import small_muse
from helpers.refusals import assert_refused
from helpers.small_tokenizers import CHATML, byte_level
from helpers.tiny import tiny_llama
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, TrainingArguments

import palu
from palu.data.files import DataError
from palu.models.generation import encode_prompts, eval_mode, generate_ids
from palu.models.positions import max_positions

POSITIONS = 64
ANSWER = "Ada Lovelace did." + " The cat sat." * 30
LONG = [{"question": "Who wrote it?", "answer": ANSWER, "spans": [[0, 12]]}]
CUT = [{"question": "Who wrote it?", "answer": "The cat sat. " * 30 + "Ada did.", "spans": [[390, 393]]}]
SHORT = {"question": "Who?", "answer": "Ada."}
KEPT = [LONG[0] | {"question": "Who was it?"}]
TOKENIZER = byte_level(CHATML, bos=False)
SETTINGS: dict[str, Any] = {"epochs": 1, "learning_rate": 0.01, "progress": False, "lora_rank": None}


def small(kind: str = "GPT2", **more: Any) -> Any:
    names: dict[str, Any] = {"n_positions": POSITIONS, "n_embd": 32, "n_layer": 2, "n_head": 4}
    if kind == "OPT":
        names = {"max_position_embeddings": POSITIONS, "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48}
        names |= {"num_hidden_layers": 2, "num_attention_heads": 4}
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=len(TOKENIZER), bos_token_id=None, eos_token_id=None, pad_token_id=0, **names | more
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize(("kind", "more"), [("GPT2", {}), ("OPT", {}), ("GPTJ", {"rotary_dim": 4})])
def test_the_table_is_found(kind: str, more: dict[str, Any]) -> None:
    model = small(kind, **more)
    assert max_positions(model) == POSITIONS
    ids = torch.zeros(1, POSITIONS + 1, dtype=torch.int64)
    model(ids[:, 1:])
    with pytest.raises(IndexError):
        model(ids)


def test_a_model_that_computes_its_positions_has_no_bound() -> None:
    assert max_positions(tiny_llama(max_position_embeddings=POSITIONS)) is None


def test_a_run_with_longer_rows() -> None:
    """By default: rows are cut after the last position, for the record, the anchors and the run."""
    model = small()
    recorder = palu.Recorder(model, LONG, KEPT, tokenizer=TOKENIZER, config=palu.UnlearnConfig(**SETTINGS))
    result = palu.unlearn(model, None, LONG, KEPT, tokenizer=TOKENIZER, **SETTINGS)
    assert result.summary["config"]["max_length"] == recorder.config.max_length == POSITIONS
    assert len(recorder.forget[0].input_ids) == POSITIONS
    assert len(result.history) == 1
    shorter = palu.unlearn(small(), None, LONG, KEPT, tokenizer=TOKENIZER, max_length=40, **SETTINGS)
    assert shorter.summary["config"]["max_length"] == 40
    reference = small()
    reference.config.max_position_embeddings = 50
    reference.transformer.wpe = torch.nn.Embedding(50, 32)
    bounded = palu.unlearn(small(), reference, LONG, KEPT, tokenizer=TOKENIZER, **SETTINGS)
    assert bounded.summary["config"]["max_length"] == 50


def test_the_trainer(tmp_path: Path) -> None:
    arguments = TrainingArguments(str(tmp_path), num_train_epochs=1, report_to=[], save_strategy="no", use_cpu=True)
    trainer = palu.PaluTrainer(small(), arguments, forget=LONG, retain=KEPT, processing_class=TOKENIZER)
    assert trainer.data.forget.longest() == trainer.data.config.max_length == POSITIONS


def test_spans_beyond_the_last_position() -> None:
    given = {"forget": LONG + CUT, "retain": KEPT, "tokenizer": TOKENIZER}
    for length, more in ((POSITIONS, {}), (40, {"max_length": 40})):
        assert_refused(
            small(), DataError, f"forget set: max_length = {length} cuts off spans of 1 row (1), ", **given, **more
        )


def test_answers_beyond_the_last_position() -> None:
    """A larger max_length would be clamped again."""
    cut = [{"question": "Who wrote it? " * 30, "answer": "Ada.", "spans": []}]
    told = "set has no answer token in the first 64 tokens of any row; the model has 64 positions, so shorten the rows"
    for name, given in (("forget", {"forget": cut, "retain": KEPT}), ("retain", {"forget": LONG, "retain": cut})):
        assert_refused(small(), DataError, f"{name} {told}", tokenizer=TOKENIZER, **given)


def test_generation_ends_at_the_last_position() -> None:
    model = small()
    prompts, _ = encode_prompts(["Who wrote it?"], TOKENIZER)

    lengths = {"max_new_tokens": 2 * POSITIONS, "batch_tokens": 1024}
    with eval_mode(model):
        (found,) = generate_ids(model, prompts, set(), pad=0, bar=tqdm(disable=True), **lengths)
    assert len(found) == POSITIONS - len(prompts[0])
    (longer,) = (torch.cat([prompt, torch.tensor(found), prompt[:1]]) for prompt in prompts)
    with eval_mode(model), pytest.raises(DataError, match=r"^a prompt has 65 tokens and the model 64 positions; short"):
        generate_ids(model, [prompts[0], longer], set(), pad=0, bar=tqdm(disable=True), **lengths)


def test_what_is_scored_whole_must_fit() -> None:
    """An evaluation or a finder of spans cannot cut."""
    row = {name: value for name, value in LONG[0].items() if name != "spans"}
    with pytest.raises(DataError, match=r"^forget row 0 has \d+ tokens and model 64 positions; shorten it$"):
        palu.annotate([row], "contrast", small(), TOKENIZER, progress=False)
    with pytest.raises(DataError, match=r"^evaluation row 1 has \d+ tokens and model 64 positions; shorten it$"):
        palu.evaluate.questions(small(), TOKENIZER, [SHORT, row], progress=False)


def test_muse() -> None:
    """Of texts for PrivLeak the first tokens are looked at; a prompt that does not fit is named."""
    asked = ("knowmem_forget_qa", "knowmem_forget_qa_icl", "knowmem_retain_qa", "knowmem_retain_qa_icl")
    data = small_muse() | {name: [SHORT] * 2 for name in asked}
    data |= {f"privleak_{side}": [ANSWER, ANSWER.upper()] for side in ("forget", "holdout")}
    settings: dict[str, Any] = {"language": None, "verbmem_tokens": 2, "knowmem_tokens": 2, "progress": False}
    results = palu.evaluate.muse(small(n_positions=96), TOKENIZER, data=data, **settings)
    assert results["palu"]["max_length"] == 96 and results["mia_min_k"]["agg_value"] == 0.5
    for name, row in (
        ("verbmem_forget", {"prompt": ANSWER, "gt": "a"}),
        ("knowmem_forget_qa", SHORT | {"question": ANSWER}),
    ):
        message = rf"^{name} row 1 has \d+ tokens and model 96 positions; shorten it$"
        with pytest.raises(DataError, match=message):
            palu.evaluate.muse(small(n_positions=96), TOKENIZER, data=data | {name: [data[name][0], row]}, **settings)
