"""QLoRA: an adapter on a base that bitsandbytes has quantised; and models over several devices, which are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from accelerate import Accelerator
from helpers.benchmark_data import quick_tofu
from helpers.refusals import assert_refused
from helpers.runs import TEXT_FORGET, TEXT_RETAIN, assert_same_run, unlearn
from helpers.small_tokenizers import CHATML, byte_level
from helpers.tiny import changed, forget_rows, overfit, retain_rows, same_weights, tiny_llama, weights
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaForCausalLM, TrainingArguments

import palu
from palu.models.checks import check_models
from palu.models.quantized import quantized_by, quantized_layers
from palu.ref_model.fingerprint import fingerprint_model

bnb = pytest.importorskip("bitsandbytes", reason="quantised models need bitsandbytes")

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # PEFT's
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning"),
]

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
KINDS: dict[str, dict[str, Any]] = {
    "nf4": NF4,
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "nf4, double, bfloat16": NF4 | {"bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.bfloat16},
    "int8": {"load_in_8bit": True},
}
LORA = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved Llama that knows the forget rows by heart."""
    folder = tmp_path_factory.mktemp("model")
    model = tiny_llama(hidden_size=64, intermediate_size=128, tie_word_embeddings=False, initializer_range=0.1)
    overfit(model, forget_rows())
    model.save_pretrained(folder)
    return folder


def load(folder: Path, kind: str = "nf4", dtype: torch.dtype = torch.float32, **options: Any) -> LlamaForCausalLM:
    config = BitsAndBytesConfig(**KINDS[kind] | options)
    where = {"": Accelerator().device} if torch.cuda.is_available() else None
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype, device_map=where)


def plain(folder: Path) -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def adapted(model: LlamaForCausalLM, seed: int = 0, **settings: Any) -> peft.PeftModel:
    torch.manual_seed(seed)
    return peft.get_peft_model(model, peft.LoraConfig(**LORA | settings))


def dequantized(model: LlamaForCausalLM, folder: Path) -> LlamaForCausalLM:
    """A model of plain float weights, which are those that the quantised ones stand for."""
    copied = plain(folder)
    for path, layer in quantized_layers(model):
        weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        copied.get_submodule(path).weight.data = weight.float().cpu()
    return copied


# --- Runs ---
RUNS = [(kind, torch.float32, False) for kind in KINDS]
RUNS += [(kind, torch.bfloat16, prepared) for kind in ("nf4", "int8") for prepared in (False, True)]


@pytest.mark.parametrize(("kind", "dtype", "prepared"), RUNS)
def test_only_the_adapter_is_trained(folder: Path, kind: str, dtype: torch.dtype, prepared: bool) -> None:
    """PEFT's preparation raises what is not quantised to float32 and switches checkpoints on."""
    model = load(folder, kind, dtype)
    model = adapted(peft.prepare_model_for_kbit_training(model) if prepared else model)
    before = weights(model)
    result = unlearn(model, learning_rate=5e-3, epochs=10, gradient_checkpointing=kind == "nf4" and not prepared)
    assert quantized_by(model) == "bitsandbytes"
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert changed(model, before) == {name for name in before if ".lora_" in name}
    assert result.history[-1]["local"] < 0.7 * result.history[0]["local"]


def test_a_run_is_that_on_the_dequantised_weights(folder: Path) -> None:
    """Also after passes without gradients, after which bitsandbytes has none on some CPUs."""
    model = load(folder, bnb_4bit_compute_dtype=torch.float32)
    other = adapted(dequantized(model, folder))
    quantised, expected = unlearn(adapted(model), epochs=2), unlearn(other, epochs=2)
    for ours, theirs in zip(quantised.history, expected.history, strict=True):
        for name in ("loss", "local", "retain", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3), name


def test_references(folder: Path) -> None:
    """None, the same quantised model, and the model that it was made from."""
    alone = unlearn(adapted(load(folder)))
    assert abs(alone.history[0]["kl"]) < 1e-6
    assert_same_run(alone, unlearn(adapted(load(folder)), load(folder)), 1e-6)
    reference = plain(folder)
    before = weights(reference)
    assert unlearn(adapted(load(folder)), reference).history[0]["kl"] > 1e-5
    assert same_weights(reference, before)
    assert unlearn(plain(folder), load(folder)).history[0]["kl"] > 1e-5


def test_a_run_that_was_stopped_goes_on(folder: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"epochs": 4, "checkpoint_dir": str(tmp_path), "checkpoint_steps": 3}
    whole = unlearn(adapted(load(folder)), **settings)
    max(tmp_path.glob("step-*")).unlink()  # that of the last step, 8
    assert_same_run(whole, unlearn(adapted(load(folder)), resume=True, **settings), 0.0)
    with pytest.raises(palu.CheckpointError, match="the model is another one"):
        unlearn(adapted(load(folder, "fp4")), resume=True, **settings)


def test_trainer(folder: Path, tmp_path: Path) -> None:
    model = adapted(load(folder))
    arguments = TrainingArguments(str(tmp_path), num_train_epochs=2, report_to="none", disable_tqdm=True, use_cpu=True)
    trainer = palu.PaluTrainer(model, arguments, forget=forget_rows(), retain=retain_rows())
    before = weights(model)
    trainer.train()
    moved = changed(model, before)
    assert moved and all(".lora_" in name for name in moved)


def test_saving_and_looking_at_a_run(folder: Path, tmp_path: Path) -> None:
    tokenizer = byte_level(CHATML)
    tokenizer.pad_token = tokenizer.eos_token
    small = tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=512, initializer_range=0.05)
    small.save_pretrained(tmp_path / "base")
    model = adapted(load(tmp_path / "base"))
    recorder = palu.Recorder(model, TEXT_FORGET, TEXT_RETAIN, tokenizer=tokenizer)
    result = unlearn(model, None, TEXT_FORGET, TEXT_RETAIN, tokenizer=tokenizer, epochs=1)
    palu.save_run(tmp_path / "run", result, tokenizer, recorder)
    saved = tmp_path / "run" / "model"
    assert {path.name for path in saved.glob("*.safetensors")} == {"adapter_model.safetensors"}
    record = json.loads((tmp_path / "run" / "private" / "record.json").read_text())
    assert "bitsandbytes" in record["versions"]
    again = peft.PeftModel.from_pretrained(load(tmp_path / "base"), saved)
    ids = torch.arange(20)[None].to(model.device)
    with torch.no_grad():  # in training mode, in which no CPU lays weights out again
        torch.testing.assert_close(again.train()(ids).logits, model.train()(ids).logits)


def test_evaluation_is_that_of_the_dequantised_weights(tmp_path: Path) -> None:
    tokenizer = byte_level(CHATML, bos=False)
    tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=512).save_pretrained(tmp_path)
    model = load(tmp_path, bnb_4bit_compute_dtype=torch.float32)
    expected = quick_tofu(dequantized(model, tmp_path), tokenizer)
    for evaluated in (model, adapted(model)):
        found = quick_tofu(evaluated, tokenizer)
        for name in ("forget_Q_A_Prob", "retain_Q_A_ROUGE", "mia_min_k", "model_utility"):
            assert found[name]["agg_value"] == pytest.approx(expected[name]["agg_value"], rel=1e-3), name


# --- Fingerprints ---
def test_fingerprints_see_what_the_numbers_are_made_of(folder: Path) -> None:
    model = load(folder)
    first = fingerprint_model(model)
    assert fingerprint_model(load(folder)) == first
    assert len({fingerprint_model(load(folder, kind)) for kind in KINDS}) == len(KINDS)
    _, layer = next(quantized_layers(model))
    layer.weight.quant_state.absmax[0] *= 2  # the integers stay
    assert fingerprint_model(model) != first


@pytest.mark.parametrize("kind", KINDS)
def test_passes_leave_the_fingerprint(folder: Path, kind: str) -> None:
    """bitsandbytes moves the scales of an 8-bit layer, in its first pass."""
    model = adapted(load(folder, kind))
    check_models(model, None, None, model.device, "no")
    first = fingerprint_model(model)
    with torch.no_grad():
        model.eval()(torch.arange(20)[None].to(model.device))
    assert fingerprint_model(model) == first


# --- Refusals ---
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_what_quantised_weights_cannot(folder: Path, kind: str) -> None:
    """To be trained, or to be the head's."""
    assert_refused(load(folder, kind), ValueError, "model is quantised, and quantised weights cannot be trained; ")
    head = load(folder, kind, llm_int8_skip_modules=["none"])
    assert_refused(adapted(head, target_modules=["q_proj"]), ValueError, "the head of model is quantised, ")


def test_another_device_or_engine(folder: Path) -> None:
    model = adapted(load(folder))
    with pytest.raises(ValueError, match=r"model is quantised and on \w+(:0)?, while the run is on meta; load it"):
        check_models(model, None, None, torch.device("meta"), "no")
    with pytest.raises(ValueError, match="ref_model is quantised, and its weights cannot be sharded by FSDP2 or"):
        check_models(tiny_llama(), load(folder), None, model.device, "no", sharded=True)


@pytest.mark.skipif(not bnb.functional.has_avx512bf16(), reason="this CPU keeps 4-bit weights as they are")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the models are on a GPU")
def test_weights_that_have_lost_their_gradient(folder: Path) -> None:
    model = adapted(load(folder)).eval()
    with torch.no_grad():
        model(torch.arange(20)[None])
    with pytest.raises(ValueError, match="the 4-bit weights of model were laid out again by a pass on this CPU"):
        unlearn(model)


def test_a_device_map_of_one_device(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu")
    assert_same_run(unlearn(model), unlearn(plain(folder)), 1e-6)
