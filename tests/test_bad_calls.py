"""Bad models, settings and tensors: each refused in exactly these words, with nothing changed.

Rows are in tests/test_bad_input.py. What only one part can be asked is in that part's own tests.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from accelerate import Accelerator
from helpers.benchmark_data import small_muse, small_tofu
from helpers.refusals import Call, Cases, refused, text, unlearn, words
from helpers.tiny import VOCAB, forget_rows, retain_rows, tiny_llama
from torch import Tensor, nn
from transformers import (
    EarlyStoppingCallback,
    LlamaForCausalLM,
    LlamaModel,
    ProgressCallback,
    TrainerCallback,
    TrainingArguments,
)
from transformers.integrations import TensorBoardCallback

import palu
from palu.config import UnlearnConfig, readers_of
from palu.models.lora import UnsupportedModelError
from palu.ref_model.anchors import anchor_texts

META = torch.device("meta")  # stands for another device
NAN, INF = float("nan"), float("inf")


def trainer(**changed: Any) -> Call:
    given = {"model": tiny_llama(), "args": TrainingArguments("out", report_to="none"), "forget": forget_rows()}
    return palu.PaluTrainer, given | {"retain": retain_rows()} | changed


def prefix_mask(**changed: Any) -> Call:
    return palu.prefix_mask, {"labels": torch.tensor([[-100, 1, -200]]), "n": 3} | changed


def palu_loss(**changed: Any) -> Call:
    given = {"logits": torch.randn(1, 3, 5), "ref_logits": torch.randn(1, 3, 5)}
    return palu.palu_loss, given | {"labels": torch.tensor([[-100, 1, -200]])} | changed


def topk_mse(**changed: Any) -> Call:
    return palu.topk_mse, {"logits": torch.randn(2, 6), "index": torch.tensor([[0, 1], [2, 3]])} | changed


def linear_topk_mse(**changed: Any) -> Call:
    given = {"hidden": torch.randn(2, 3), "weight": torch.randn(6, 3), "index": torch.tensor([[0, 1], [2, 3]])}
    return palu.linear_topk_mse, given | changed


def linear_topk_unlikelihood(**changed: Any) -> Call:
    return palu.linear_topk_unlikelihood, linear_topk_mse()[1] | changed


def overwriting(grad_logits: Tensor) -> Call:
    """The raw op, which fills a buffer."""
    given = {"grad": torch.ones(2), "slope": torch.ones(2, 2), "index": torch.tensor([[0, 1], [2, 3]])}
    return torch.ops.palu.topk_backward, given | {"through_mean": True, "grad_logits": grad_logits}


def config(**settings: Any) -> Call:
    return palu.UnlearnConfig, settings


def muse(**changed: Any) -> Call:
    model = tiny_llama(vocab_size=len(words()), max_position_embeddings=512)
    given = {"model": model, "tokenizer": words(), "data": small_muse(), "progress": False}
    return palu.evaluate.muse, given | changed


def tofu(**changed: Any) -> Call:
    return palu.evaluate.tofu, muse(**{"data": small_tofu(), "max_new_tokens": 4} | changed)[1]


def questions(model: Any, original: Any) -> Call:
    rows = [{"question": "Who?", "answer": "Ada."}]
    return palu.evaluate.questions, {"model": model, "original": original, "tokenizer": words(), "rows": rows}


def lora(on: list[str], settings: Any = (), **config: Any) -> peft.PeftModel:
    model = tiny_llama(tie_word_embeddings=False, **config)
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=on, task_type="CAUSAL_LM", **dict(settings)))


def after(model: Any, change: Callable[[Any], object]) -> Any:
    change(model)
    return model


def quantised(model: Any, method: str) -> Any:
    """As transformers marks one; tests/models/test_quantized.py has real ones."""
    base = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    base.is_quantized, base.quantization_method = True, method
    return model


def offloaded() -> LlamaForCausalLM:
    """As a device_map leaves it that keeps a layer on the disk."""
    return after(tiny_llama(), lambda model: model.model.layers[1].to(META))


CAUSAL = "which is not a causal language model with a linear head; load it with AutoModelForCausalLM.from_pretrained"
BNB = "while palu works with bitsandbytes: load it with a BitsAndBytesConfig (load_in_4bit or load_in_8bit), or without a quantization_config"
WHOLE = "load it without offloading to CPU or disk"
TRAINERS_OWN = "which goes by Trainer's arguments; leave it out and write a TrainerCallback (docs/unlearn.md), or set report_to for a tracker"
DataError = palu.DataError

BAD: Cases = {
    # Models
    "a model's name": (lambda: unlearn(model="meta-llama/Llama-3.2-1B"), UnsupportedModelError, f"model is a str, {CAUSAL}"),
    "no model": (lambda: unlearn(model=None), UnsupportedModelError, f"model is a NoneType, {CAUSAL}"),
    "a model without a head": (lambda: unlearn(model=LlamaModel(tiny_llama().config)), UnsupportedModelError, f"model is a LlamaModel, {CAUSAL}"),
    "a reference without a head": (lambda: unlearn(ref_model=LlamaModel(tiny_llama().config)), UnsupportedModelError, f"ref_model is a LlamaModel, {CAUSAL}"),
    "a head of two layers": (lambda: unlearn(model=after(tiny_llama(), lambda m: setattr(m, "lm_head", nn.Sequential(nn.Linear(32, 32), m.lm_head)))), UnsupportedModelError, f"model is a LlamaForCausalLM, {CAUSAL}"),
    "the model as its own reference": (lambda: unlearn(model=(m := tiny_llama()), ref_model=m), ValueError, "ref_model is the model itself, which training would change; pass None to use its starting weights"),
    "a model inside its reference": (lambda: unlearn(ref_model=(m := lora(["q_proj"])), model=m.get_base_model()), ValueError, "ref_model is the model itself, which training would change; pass None to use its starting weights"),
    "two adapters on one base": (lambda: questions(model=(m := lora(["q_proj"], vocab_size=len(words()))), original=peft.PeftModel(m.get_base_model(), m.peft_config["default"], "other")), ValueError, "model and original share one base model, which has an adapter in it; load model on its own"),
    "a base with a merged adapter": (lambda: questions(model=(m := after(lora(["q_proj"], vocab_size=len(words())), lambda m: m.merge_adapter())), original=m.get_base_model()), ValueError, "original and model share one base model, which has an adapter in it; load original on its own"),
    "a reference with another vocabulary": (lambda: unlearn(ref_model=tiny_llama(vocab_size=VOCAB + 1)), ValueError, f"the model has a vocabulary of {VOCAB} and ref_model one of {VOCAB + 1}; the reference must be the model as it was before training"),
    "a frozen model": (lambda: unlearn(model=tiny_llama().requires_grad_(False)), ValueError, "no parameter of the model requires a gradient, so nothing could be unlearned"),
    "a model with NaN in it": (lambda: unlearn(model=after(tiny_llama(), lambda m: m.model.layers[1].mlp.down_proj.weight.data[0, 0].fill_(NAN))), palu.DivergenceError, "step 1: loss = nan, local = nan, kl = nan, retain = nan, grad_norm = nan, onset_probability = nan; the model keeps the weights of step 0. Lower the learning rate, or look at the model and the data of this step"),
    "an adapter on the head": (lambda: unlearn(model=lora(["q_proj", "lm_head"])), ValueError, "the adapter of model is on lm_head; PALU needs the head as the reference has it: leave lm_head out of target_modules, modules_to_save and trainable_token_indices"),
    "an adapter on a base quantised otherwise": (lambda: unlearn(model=quantised(lora(["q_proj"]), "gptq")), ValueError, f"model is quantised by gptq, {BNB}"),
    "a reference quantised otherwise": (lambda: unlearn(ref_model=quantised(tiny_llama(), "awq")), ValueError, f"ref_model is quantised by awq, {BNB}"),
    "a quantised model": (lambda: unlearn(model=quantised(tiny_llama(), "bitsandbytes")), ValueError, "model is quantised, and quantised weights cannot be trained; add a LoRA adapter (docs/lora.md), or load it without a quantization_config"),
    "an activated adapter": (lambda: unlearn(model=lora(["q_proj"], {"alora_invocation_tokens": [1, 2]})), ValueError, "model has an activated LoRA, which acts on some tokens only; leave out alora_invocation_tokens"),
    "a frozen adapter": (lambda: unlearn(model=lora(["q_proj"]).requires_grad_(False)), ValueError, "no parameter of the adapter 'default' requires a gradient, so nothing could be unlearned; load it with is_trainable=True"),
    "a base that is trained": (lambda: unlearn(model=after(lora(["q_proj"]), lambda m: m.get_output_embeddings().requires_grad_(True))), ValueError, "base_model.model.lm_head.weight requires a gradient and is no part of the adapter 'default', so that saving the adapter would lose it; freeze it"),
    "two active adapters": (lambda: unlearn(model=after(lora(["q_proj"]), lambda m: (m.add_adapter("second", m.peft_config["default"]), m.base_model.set_adapter(["default", "second"])))), ValueError, "the model has 2 active adapters (default, second); choose the one to train with set_adapter"),
    "no active adapter": (lambda: unlearn(model=after(lora(["q_proj"]), lambda m: m.delete_adapter("default"))), ValueError, "model is a PeftModelForCausalLM without any adapter; use get_base_model() of it"),
    "a merged adapter": (lambda: unlearn(model=after(lora(["q_proj"]), lambda m: m.merge_adapter())), ValueError, "the adapter 'default' is merged into the base weights; call unmerge_adapter() before unlearning"),
    "a disabled adapter": (lambda: unlearn(model=after(lora(["q_proj"]), lambda m: m.base_model.disable_adapter_layers())), ValueError, "the adapter 'default' is disabled; call base_model.enable_adapter_layers()"),
    "an adapter that changes its base": (lambda: unlearn(model=lora(["q_proj"], {"init_lora_weights": "pissa"})), ValueError, "the adapter 'default' was initialised by pissa, which changes the base weights, so that the model without its adapter is not the model before training; pass ref_model"),
    "a reference with the model's adapter in it": (lambda: unlearn(model=(m := lora(["q_proj"])), ref_model=m.get_base_model()), ValueError, "ref_model has the model's adapter in it, since PEFT puts it there; pass None to use the model without its adapter"),
    "an adapter of another kind": (lambda: unlearn(model=peft.get_peft_model(tiny_llama(), peft.IA3Config(task_type="CAUSAL_LM"))), UnsupportedModelError, "model has an adapter of PEFT type IA3; palu works with LoRA (peft.LoraConfig)"),
    "an adapter around something else": (lambda: unlearn(model=peft.get_peft_model(nn.Sequential(nn.Linear(2, 2)), peft.LoraConfig(target_modules=["0"]))), UnsupportedModelError, f"model is a PeftModel, {CAUSAL}"),
    "a model over several devices": (lambda: unlearn(model=after(tiny_llama(), lambda m: setattr(m, "hf_device_map", {"model": 0, "lm_head": 1}))), ValueError, "model is spread over the devices 0, 1 by its device_map; load it on one device (device_map={'': 0}), or leave device_map out and shard it with FSDP2 (docs/processes.md)"),
    # Devices and dtypes of models
    "a model without weights": (lambda: unlearn(model=tiny_llama().to(META)), ValueError, f"model is not wholly loaded: model.embed_tokens.weight is on the meta device; {WHOLE}"),
    "a model in part elsewhere": (lambda: unlearn(model=offloaded()), ValueError, f"model is not wholly loaded: model.layers.1.self_attn.q_proj.weight is on the meta device; {WHOLE}"),
    "a reference in part elsewhere": (lambda: unlearn(ref_model=offloaded()), ValueError, f"ref_model is not wholly loaded: model.layers.1.self_attn.q_proj.weight is on the meta device; {WHOLE}"),
    "a half-precision model": (lambda: unlearn(model=tiny_llama().half()), ValueError, "the model is in float16, in which gradients and AdamW's steps underflow, those of an adapter on it, too; load it with dtype=torch.bfloat16 or torch.float32"),
    "rows on another device": (lambda: unlearn(forget=[{name: torch.tensor(v, device=META) for name, v in one.items()} for one in forget_rows()]), DataError, "forget row 0: input_ids must be int64, got other values; give a flat list of integers"),
    # Settings
    "a setting of no name": (lambda: unlearn(topk=10), TypeError, f"'topk' is no setting of palu.unlearn; the settings are {', '.join(sorted(palu.UnlearnConfig().values()))}"),
    "settings of other methods": (lambda: unlearn(delta=3), ValueError, "delta = 3: objective = 'palu' does not read it (simnpo would); leave it out"),
    "a setting of PALU alone": (lambda: unlearn(objective="npo", anchors=7), ValueError, "anchors = 7: objective = 'npo' does not read it (palu would); leave it out"),
    "settings in a dict": (lambda: unlearn(config={"top_k": 10}), TypeError, "config is a dict; give a palu.UnlearnConfig, or its fields as arguments"),
    "a value that no chat template knows": (lambda: text(chat_template_kwargs={"enable_thinking": False}), ValueError, "chat_template_kwargs = {'enable_thinking': False}: the chat template knows no enable_thinking; correct the name or leave it out"),
    "a chat template's values without one": (lambda: unlearn(chat_template_kwargs={"enable_thinking": False}), ValueError, "chat_template_kwargs = {'enable_thinking': False}: there is no chat template; leave it out"),
    "a tokenizer by the name that Trainer had for it": (lambda: trainer(tokenizer=words()), TypeError, "PaluTrainer takes no tokenizer: pass it as processing_class, as to Trainer"),
    "a callback's class": (lambda: unlearn(callbacks=[TrainerCallback]), TypeError, "callbacks[0] is the class TrainerCallback; give an instance of it: TrainerCallback()"),
    "a function for a callback": (lambda: unlearn(callbacks=[print]), TypeError, "callbacks[0] is a builtin_function_or_method; give an instance of a transformers.TrainerCallback"),
    "one callback": (lambda: unlearn(callbacks=TrainerCallback()), TypeError, "callbacks is a TrainerCallback; give a list of transformers.TrainerCallback"),
    "a callback of Trainer's own": (lambda: unlearn(callbacks=[EarlyStoppingCallback()]), TypeError, f"callbacks[0] is transformers' EarlyStoppingCallback, {TRAINERS_OWN}"),
    "Trainer's progress bar": (lambda: unlearn(callbacks=[ProgressCallback()]), TypeError, f"callbacks[0] is transformers' ProgressCallback, {TRAINERS_OWN}"),
    "a tracker for a callback": (lambda: unlearn(callbacks=[TensorBoardCallback()]), TypeError, f"callbacks[0] is transformers' TensorBoardCallback, {TRAINERS_OWN}"),
    "metrics for an evaluation": (lambda: unlearn(evaluate={"told": 1}), TypeError, "evaluate is a dict; give a function that takes the model and returns numbers by name"),
    "nothing to evaluate at steps": (lambda: unlearn(eval_steps=2), ValueError, "eval_steps = 2: there is nothing to evaluate; give evaluate, too"),
    "anchors without a tokenizer": (lambda: unlearn(anchors=5), DataError, "anchors = 5: for the model to answer everyday prompts there must be a tokenizer; pass it, or set anchors=0"),
    "anchors without a KL": (lambda: text(retain=None, lambda_kl=0), ValueError, "retain = None: the model's own answers are kept by the KL, and lambda_kl = 0; raise it, or give retain examples, or retain=[] with lambda_retain=0"),
    "more anchors than prompts": (lambda: text(retain=None, anchors=10**4), ValueError, f"anchors = 10000: there are {len(anchor_texts())} everyday prompts; give no more than these"),
    "no rows to retain for another method": (lambda: text(retain=None, objective="npo"), DataError, "the retain set is empty while lambda_retain = 1.0; give examples to keep, or set lambda_retain=0"),
    "a resume from nowhere": (lambda: config(resume=True), ValueError, "resume = True: give checkpoint_dir, too"),
    "checkpoints to nowhere, by steps": (lambda: config(checkpoint_steps=5), ValueError, "checkpoint_steps = 5: give checkpoint_dir, too"),
    "checkpoints to nowhere, by time": (lambda: config(checkpoint_minutes=5), ValueError, "checkpoint_minutes = 5: give checkpoint_dir, too"),
    "a warmup that the schedule leaves out": (lambda: config(lr_scheduler="constant", warmup_steps=2), ValueError, 'warmup_steps = 2: lr_scheduler = "constant" has no warmup; give "constant_with_warmup"'),
    # The ops
    "an index out of range": (lambda: topk_mse(index=torch.tensor([[0, 1], [6, 3]])), IndexError, "palu::topk_mse: index[1, 0] = 6 is out of range for a vocabulary of 6"),
    "a negative index": (lambda: linear_topk_mse(index=torch.tensor([[0, -1], [2, 3]])), IndexError, "palu::linear_topk_mse: index[0, 1] = -1 is out of range for a vocabulary of 6"),
    "an index that wants a gradient": (lambda: topk_mse(index=torch.zeros(2, 2, requires_grad=True)), TypeError, "palu::topk_mse: index must be int32 or int64, got float32"),
    "an index in int16": (lambda: topk_mse(index=torch.zeros(2, 2, dtype=torch.int16)), TypeError, "palu::topk_mse: index must be int32 or int64, got int16"),
    "a mask for an index": (lambda: topk_mse(index=torch.ones(2, 2, dtype=torch.bool)), TypeError, "palu::topk_mse: index must be int32 or int64, got bool"),
    "an index in a list": (lambda: topk_mse(index=[[0, 1], [2, 3]]), TypeError, "palu::topk_mse: index must be a torch.Tensor, got list"),
    "an index on another device": (lambda: topk_mse(index=torch.zeros(2, 2, dtype=torch.int64, device=META)), ValueError, "palu::topk_mse: index is on meta but logits is on cpu; move it there"),
    "logits on another device": (lambda: topk_mse(logits=torch.zeros(2, 6, device=META)), ValueError, "palu::topk_mse: index is on cpu but logits is on meta; move it there"),
    "half-precision logits": (lambda: topk_mse(logits=torch.zeros(2, 6, dtype=torch.float16)), TypeError, "palu::topk_mse: logits is float16, which the CPU kernels do not support; use bfloat16 or float32"),
    "sparse logits": (lambda: topk_mse(logits=torch.eye(6)[:2].to_sparse()), TypeError, "palu::topk_mse: logits must be a dense tensor, got a torch.sparse_coo one"),
    "an infinite target": (lambda: topk_mse(target=INF), ValueError, "unknown target inf; choose one of global_mean, global_mean_detached, local_mean, or a finite number"),
    "no rows in an index": (lambda: topk_mse(index=torch.zeros(0, 2, dtype=torch.int64)), ValueError, "palu::topk_mse: index must have one row for each of the 2 rows, got 0"),
    "a head on another device": (lambda: linear_topk_mse(weight=torch.zeros(6, 3, device=META)), ValueError, "palu::linear_topk_mse: weight is on meta but hidden is on cpu; move it there"),
    "a bias on another device": (lambda: linear_topk_mse(bias=torch.zeros(6, device=META)), ValueError, "palu::linear_topk_mse: bias is on meta but hidden is on cpu; move it there"),
    "a head in another dtype": (lambda: linear_topk_mse(weight=torch.zeros(6, 3, dtype=torch.float64)), TypeError, "palu::linear_topk_mse: weight must be float32, got float64"),
    "a half-precision head": (lambda: linear_topk_mse(hidden=torch.zeros(2, 3).half(), weight=torch.zeros(6, 3).half()), TypeError, "palu::linear_topk_mse: hidden is float16, which the CPU kernels do not support; use bfloat16 or float32"),
    "a true token alone": (lambda: linear_topk_unlikelihood(index=torch.tensor([[0], [2]]), impl="dense"), ValueError, "palu::linear_topk_unlikelihood: index must hold the true token and at least one candidate in each row, got K = 1"),
    "a floor of one": (lambda: linear_topk_unlikelihood(floor=1.0), ValueError, "palu::linear_topk_unlikelihood: floor must be in [0, 1), got 1.000000"),
    "a floor that is no number": (lambda: linear_topk_unlikelihood(floor="0.1"), TypeError, "palu::linear_topk_unlikelihood: floor must be a number in [0, 1), got '0.1'"),
    "a mean row of another size": (lambda: linear_topk_mse(weight_mean=torch.zeros(6)), ValueError, "palu::linear_topk_mse: weight_mean must have shape [3], got [6]"),
    "a buffer of zero stride": (lambda: overwriting(torch.zeros(1, 6).expand(2, 6)), ValueError, "palu::topk_backward: grad_logits must not have rows that overlap, got shape [2, 6] and strides [0, 1]"),
    "a buffer in steps": (lambda: overwriting(torch.zeros(6, 2).t()), ValueError, "palu::topk_backward: grad_logits must have unit stride in its last dimension, got strides [1, 2]"),
    "a buffer on another device": (lambda: overwriting(torch.zeros(2, 6, device=META)), ValueError, "palu::topk_backward: grad_logits is on meta but grad is on cpu; move it there"),
    "a mask of int32 labels": (lambda: prefix_mask(labels=torch.zeros(1, 3, dtype=torch.int32)), TypeError, "palu::prefix_mask: labels must be int64, got int32"),
    "a mask of a fractional N": (lambda: prefix_mask(n=1.5), TypeError, "palu::prefix_mask: n must be one integer of 64 bits, got 1.5"),
    "a mask of N below -1": (lambda: prefix_mask(n=-2), ValueError, "palu::prefix_mask: n must be -1 (all) or at least 0, got -2"),
    "several ends of sequence": (lambda: prefix_mask(eos_token_id=[1, 2]), TypeError, "palu::prefix_mask: eos_token_id must be one integer of 64 bits, got [1, 2]"),
    "a loss of other shapes": (lambda: palu_loss(ref_logits=torch.zeros(1, 3, 6)), ValueError, "palu_loss needs logits and ref_logits [B, T, V] and labels [B, T], got [1, 3, 5], [1, 3, 6] and [1, 3]"),
    "a loss of int32 labels": (lambda: palu_loss(labels=torch.zeros(1, 3, dtype=torch.int32)), TypeError, "palu::prefix_mask: labels must be int64, got int32"),
    "a loss of a label that is none": (lambda: palu_loss(labels=torch.tensor([[-100, 1, -300]])), ValueError, "palu_loss: labels[0, 2] = -300: a label must be a token id below V = 5, -100 or -200"),
    "a loss with labels elsewhere": (lambda: palu_loss(labels=torch.zeros(1, 3, dtype=torch.int64, device=META)), ValueError, "palu_loss: labels is on meta but logits is on cpu; move it there"),
    "a loss with its reference elsewhere": (lambda: palu_loss(ref_logits=torch.zeros(1, 3, 5, device=META)), ValueError, "palu_loss: ref_logits is on meta but logits is on cpu; move it there"),
    "a loss of another direction": (lambda: palu_loss(kl_direction="backward"), ValueError, "kl_direction = 'backward': give one of forward, reverse"),
    "a loss of a fractional K": (lambda: palu_loss(top_k=1.5), ValueError, "top_k = 1.5: give a positive integer"),
    # Evaluation
    "a split that does not exist": (lambda: tofu(forget="forget50", data=None), ValueError, "there is no forget split 'forget50'; locuslab/TOFU has forget01, forget05, forget10"),
    "nothing to evaluate": (lambda: tofu(data=palu.evaluate.TofuData([])), DataError, "forget set is empty; give at least one row"),
    "a row to evaluate without an answer": (lambda: tofu(data=after(small_tofu(), lambda data: data.retain[1].pop("answer"))), DataError, "retain row 1: column 'answer' is missing; fill it in, or use TOFU's perturbed sets, which have it"),
    "results that are none": (lambda: tofu(retain_results={"loss": 1.0}), ValueError, "these are no results: a mapping of metrics to {agg_value, value_by_index} is needed, as palu.evaluate returns it and open-unlearning logs it"),
    "a language without a word list": (lambda: tofu(language="ja"), ValueError, "there is no word list for language 'ja'; give one of ar, bg, bn, ca, cs, da, de, el, en, es, fa, fi, fil, fr, he, hi, hu, id, is, it, lt, lv, mk, ms, nb, nl, pl, pt, ro, ru, sh, sk, sl, sv, ta, tr, uk, ur, vi, or None to leave the share of words out"),
    "a tokenizer's name to evaluate with": (lambda: tofu(tokenizer="gpt2"), TypeError, "tokenizer is a str; load it with AutoTokenizer.from_pretrained"),
    "a tokenizer's name with a chat template's values": (lambda: muse(tokenizer="gpt2", chat_template_kwargs={"a": 1}), TypeError, "tokenizer is a str; load it with AutoTokenizer.from_pretrained"),
    "a model without a head to evaluate": (lambda: tofu(model=LlamaModel(tiny_llama().config)), UnsupportedModelError, f"model is a LlamaModel, {CAUSAL}"),
    "a model to evaluate in part elsewhere": (lambda: muse(model=offloaded()), ValueError, f"model is not wholly loaded: model.layers.1.self_attn.q_proj.weight is on the meta device; {WHOLE}"),
    "a set to evaluate that is missing": (lambda: muse(data={}), DataError, "verbmem_forget set is missing or empty; use the sets of MUSE"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("name", BAD)
def test_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if "half-precision model" in name and Accelerator().device.type != "cpu":
        pytest.skip("only CPU kernels lack float16")
    build, error, message = BAD[name]
    assert refused(build, error) == message


# --- Settings ---
OBJECTIVES = "give one of palu, ga, gd, dpo, npo, simnpo, tpo, satimp, undial, or a class of method"
# Names, what each of them may not be, and what is said of it.
BAD_SETTINGS: list[tuple[str, tuple[Any, ...], str]] = [
    ("n", (0, -2, 1.5, "3", None, True), "give a positive integer, or -1 for whole spans"),
    ("top_k", (0, -1, 5.0, "all", None, True), "give a positive integer"),
    ("top_k", (1,), "the secret's own token may be the only candidate; give 2 or more"),
    ("target", ("mean", "", NAN, INF, None, True), "give one of global_mean, global_mean_detached, local_mean, or a finite number"),
    ("local_loss", ("entropy", None, 1), "give one of topk_mse, unlikelihood"),
    ("probability_floor", (-0.1, 1, NAN, "0.1", None, True), "give a number from 0 to below 1"),
    ("target", ("local_mean",), 'read by local_loss = "topk_mse" alone; give that, too, or leave it out'),
    ("kl_direction", ("both", None, 1), "give one of forward, reverse"),
    ("gamma lambda_kl lambda_retain weight_decay beta1 beta2", (-0.1, NAN, INF, "1", True), "give a number that is not negative"),
    ("objective", ("NPO", "", None, 1), OBJECTIVES),
    ("allow_cut_spans gradient_checkpointing resume progress", (None, 1, "yes"), "give True or False"),
    ("beta", (0, -1, NAN, "1", True), "give a positive number"),
    ("delta", (NAN, INF, "1", None), "give a finite number"),
    ("learning_rate", (0, -1e-5, NAN, INF, "1", True), "give a positive number, or None for one from the first gradient"),
    ("max_grad_norm", (0, -1e-5, NAN, INF, "1", None), "give a positive number"),
    ("checkpoint_minutes", (0, None), "give a positive number"),
    ("epochs", (0, -1, 1.0), "give a positive integer, or None for the method's"),
    ("batch_size gradient_accumulation_steps chunk_bytes", (0, -1, 1.0, None), "give a positive integer"),
    ("retain_batch_size", (0, -1, 2.0), "give a positive integer, or None for batch_size"),
    ("kl_rows", (0, -1, 2.0), "give a positive integer, or None for all ordinary tokens"),
    ("max_tokens", (0, -1, 2.0), "give a positive integer, or None for no bound"),
    ("max_steps", (0, -1, 2.0), "give a positive integer, or None for epochs"),
    ("eval_steps", (0, -1, 2.0), "give a positive integer, or None for one before and one after"),
    ("checkpoint_steps", (0, -1, 2.0), "give a positive integer, or None for checkpoint_minutes"),
    ("anchors", (-1, 2.0, True, "all"), "give 0 or a positive integer, or None for as many as the run can use"),
    ("neighbours variants", (-1, 2.0, True, None, "all"), "give 0 or a positive integer"),
    ("max_length", (1, 0, -1, 10.0, None), "give an integer above 1"),
    ("warmup_steps", (-1, 0.5, None), "give 0 or a positive integer"),
    ("seed", (-1, 2**32, 1.0, None), "give an integer in [0, 2**32)"),
    ("checkpoint_dir cache_dir", ("",), "give a folder's path as a string, or None for no folder"),
    ("logging_dir", ("", None), "give a folder's path as a string"),
    ("report_to", ("mlflow", "", ("wandb",)), "give one of tensorboard, wandb, both with a comma between them, or None for neither"),
    ("chat_template_kwargs", ("{}", [], 1, True, {1: 2}), "give a mapping of names to values, or None"),
    ("chat_template_kwargs", ({"d": datetime.date(2024, 7, 26)}, {"x": NAN}, {"x": {1, 2}}), "give values that JSON has (text, numbers, lists, ...); a date is text"),
    ("chat_template_kwargs", ({"tokenize": True},), "leave out tokenize, which palu sets itself"),
    ("chat_template_kwargs", ({"conversation": True},), "leave out conversation, which palu sets itself"),
]  # fmt: skip


@pytest.mark.parametrize(("names", "values", "rule"), BAD_SETTINGS)
def test_settings_that_are_not_valid(names: str, values: tuple[Any, ...], rule: str) -> None:
    for name in names.split():
        readers = readers_of(name)
        objective = {"objective": readers[0]} if readers and name != "objective" else {}
        for value in values:
            for make in (UnlearnConfig, UnlearnConfig(**objective).replace):
                with pytest.raises(ValueError, match=f"^{re.escape(f'{name} = {value!r}: {rule}')}$"):
                    make(**objective, **{name: value})
