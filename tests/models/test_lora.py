"""LoRA through PEFT: only the adapter is trained, the reference is the model without it, and nothing is copied."""

import re
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from accelerate import Accelerator
from helpers import textbook
from helpers.benchmark_data import quick_tofu
from helpers.refusals import assert_refused
from helpers.runs import assert_same_run, live_tensors, unlearn
from helpers.small_tokenizers import CHATML, byte_level
from helpers.tiny import changed, forget_rows, overfit, retain_rows, same_weights, tiny_llama, weights
from torch import Tensor
from transformers import LlamaForCausalLM

from palu.methods.palu import PaluMethod

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's


def lora(model: LlamaForCausalLM, *, trained: bool = False, name: str = "default", **settings: Any) -> peft.PeftModel:
    """The model with a fresh LoRA adapter; ``trained``: one that is not the identity."""
    torch.manual_seed(5)
    start: dict[str, Any] = {"init_lora_weights": False} if trained else {}
    config = peft.LoraConfig(**{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | start | settings)
    return peft.get_peft_model(model, config, adapter_name=name).eval()


def tiny_lora(*, trained: bool = False, **config: Any) -> peft.PeftModel:
    return lora(tiny_llama(**config), trained=trained)


def assert_only_the_adapter_changed(model: peft.PeftModel, before: dict[str, Tensor]) -> None:
    """All of it, by two matrices or more for each of seven layers of two blocks."""
    assert weights(model).keys() == before.keys()
    moved = changed(model, before)
    assert moved == {name for name in before if ".lora_" in name} and len(moved) >= 2 * 14


def input_hooks(model: peft.PeftModel) -> int:
    return len(model.get_input_embeddings()._forward_hooks)


# --- What is trained, and what is left alone ---
CHECKPOINTS: dict[str, Any] = {"gradient_checkpointing": True}


@pytest.mark.parametrize(
    ("config", "kind", "settings"),
    [
        ({}, {}, {}),
        ({"attention": "eager"}, {}, {}),
        ({"attention": "eager"}, {}, CHECKPOINTS),
        ({"dtype": torch.bfloat16}, {}, CHECKPOINTS),
        ({}, {"use_dora": True}, CHECKPOINTS),
        ({}, {"use_rslora": True}, CHECKPOINTS),
        ({}, {"lora_dropout": 0.5}, CHECKPOINTS),
        ({}, {}, {"objective": "npo"}),
        ({}, {}, {"objective": "tpo"}),
    ],
    ids=str,
)
def test_only_the_adapter_changes(config: dict[str, Any], kind: dict[str, Any], settings: dict[str, Any]) -> None:
    model = lora(tiny_llama(**config), **kind)
    before = weights(model)
    result = unlearn(model, **settings)
    assert result.model is model
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert_only_the_adapter_changed(model, before)
    if not {"dtype", "objective"} & {*config, *settings}:
        assert abs(result.history[0]["kl"]) < 1e-6 < result.history[-1]["kl"]


def test_reentrant_checkpoints_train_the_adapter_too() -> None:
    """transformers' default for years: such a layer has a gradient only if its input wants one."""
    model = tiny_lora(dtype=torch.float64)
    model.get_base_model()._set_gradient_checkpointing(
        enable=True, gradient_checkpointing_func=lambda *a: torch.utils.checkpoint.checkpoint(*a, use_reentrant=True)
    )
    before = weights(model)
    result = unlearn(model)
    assert_only_the_adapter_changed(model, before)
    assert_same_run(result, unlearn(tiny_lora(dtype=torch.float64)), 1e-12)
    assert input_hooks(model) == 0


@pytest.mark.parametrize(
    ("checkpointing", "training", "hooked"), [(False, False, False), (True, True, False), (True, False, True)]
)
def test_what_was_set_is_set_back(checkpointing: bool, training: bool, hooked: bool) -> None:
    model = tiny_lora().train(training)
    base = model.get_base_model()
    if hooked:
        base.enable_input_require_grads()
    first = [p for n, p in model.named_parameters() if "layers.0" in n and ".lora_A." in n]
    for parameter in first:
        parameter.requires_grad_(False)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    before = weights(model)
    unlearn(model, epochs=1, gradient_checkpointing=checkpointing)
    assert model.training == base.training == training
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    assert base.config._attn_implementation == "sdpa"
    assert not any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    assert input_hooks(model) == hooked
    base.disable_input_require_grads()
    assert input_hooks(model) == 0
    # What was frozen of the adapter stayed as it was.
    moved = changed(model, before)
    assert moved and not any(".lora_A." in name and "layers.0" in name for name in moved)


def test_a_plain_model_needs_no_peft_and_keeps_no_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    model = tiny_llama()
    unlearn(model, epochs=1, gradient_checkpointing=True)
    assert input_hooks(model) == 0


# --- The reference ---
@pytest.mark.parametrize(
    ("tied", "trained", "checkpointing"), [(True, False, False), (True, True, True), (False, True, False)]
)
def test_steps_equal_the_textbook(tied: bool, trained: bool, checkpointing: bool) -> None:
    """The reference is the model that never had an adapter, whatever the adapter does."""
    config = {"dtype": torch.float64, "tie_word_embeddings": tied}
    model, settings = tiny_lora(trained=trained, **config), {"epochs": 2, "gradient_checkpointing": checkpointing}
    history = textbook.assert_unlearn_equals(model, reference=tiny_llama(**config), tolerance=1e-7, **settings)
    assert (history[0]["kl"] > 1e-2) == trained


def test_a_reference_with_an_adapter_speaks_with_it() -> None:
    settings = {"dtype": torch.float64}
    model, ref_model = (tiny_lora(trained=True, **settings) for _ in range(2))
    before = weights(ref_model)
    result = unlearn(model, ref_model)
    assert abs(result.history[0]["kl"]) < 1e-12
    merged = tiny_lora(trained=True, **settings).merge_and_unload()
    assert_same_run(result, unlearn(tiny_lora(trained=True, **settings), merged), 1e-9)
    assert same_weights(ref_model, before)


def test_the_head_is_shared_and_no_base_weight_is_ever_copied() -> None:
    model = tiny_lora(tie_word_embeddings=False).to(Accelerator().device)
    base = {p.data_ptr(): p for n, p in model.named_parameters() if ".lora_" not in n and p.ndim == 2}
    others = live_tensors()  # of other tests, perhaps with the same weights; held, so that no address is used again
    known = {tensor.data_ptr() for tensor in others}
    steps = []

    class Spy(PaluMethod):
        def compute_losses(self, *args: Any) -> Any:
            terms = super().compute_losses(*args)
            assert self.ref_head.weight.data_ptr() == model.get_output_embeddings().weight.data_ptr()
            assert self.weight_mean is not None
            for tensor in live_tensors():
                if tensor.ndim == 2 and tensor.data_ptr() not in known:
                    same = [p for p in base.values() if p.shape == tensor.shape and torch.equal(p, tensor)]
                    assert not same, "a base weight has been copied"
            steps.append(len(terms))
            return terms

    unlearn(model, gradient_checkpointing=True, objective=Spy)
    assert steps == [3] * 6


# --- What comes out ---
def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(12, device=model.device)[None], use_cache=False).logits.cpu()


def test_saved_and_loaded(tmp_path: Path) -> None:
    model = unlearn(tiny_lora()).model
    model.save_pretrained(str(tmp_path))
    loaded = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=True).eval()
    assert same_weights(loaded, weights(model))
    assert torch.equal(logits(loaded.to(model.device)), logits(model))
    before = weights(loaded)
    unlearn(loaded)  # and may be trained on
    assert_only_the_adapter_changed(loaded, before)


def test_what_an_adapter_has_learnt_is_kept_by_merging_it_before_the_next_one() -> None:
    adapted: Any = unlearn(tiny_lora(dtype=torch.float64)).model
    told, merged = logits(adapted), adapted.merge_and_unload()
    assert type(merged) is LlamaForCausalLM and (logits(merged) - told).abs().max() < 1e-9
    again = unlearn(lora(merged))
    assert abs(again.history[0]["kl"]) < 1e-6


def test_secrets_go_and_the_rest_stays() -> None:
    model = tiny_llama()
    overfit(model, forget_rows() + retain_rows())
    result = unlearn(lora(model, r=8), learning_rate=1e-2, epochs=15)
    first, last = result.history[0], result.history[-1]
    assert last["local"] < 0.2 * first["local"]
    assert last["retain"] < 0.5


def test_evaluation_equals_that_of_the_merged_model() -> None:
    tokenizer = byte_level(CHATML, bos=False)
    model = tiny_lora(trained=True, vocab_size=len(tokenizer), max_position_embeddings=512)
    flags = [p.requires_grad for p in model.parameters()]
    settings, before = model.get_base_model().generation_config, weights(model)
    found = quick_tofu(model, tokenizer)
    assert same_weights(model, before)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert model.get_base_model().generation_config is settings
    expected = quick_tofu(model.merge_and_unload(), tokenizer)
    for name in ("forget_Q_A_Prob", "retain_Q_A_ROUGE", "mia_min_k", "model_utility"):
        assert found[name]["agg_value"] == pytest.approx(expected[name]["agg_value"], rel=1e-4), name


# --- Bad input ---
@pytest.mark.parametrize(
    ("settings", "tied", "where"),
    [
        ({"target_modules": ["q_proj", "lm_head"]}, True, "lm_head"),
        ({"modules_to_save": ["lm_head"]}, False, "lm_head"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, True, "model.embed_tokens"),
        ({"modules_to_save": ["embed_tokens"]}, True, "model.embed_tokens"),
        ({"trainable_token_indices": [1, 2]}, True, "model.embed_tokens"),
        ({"target_parameters": ["lm_head.weight"]}, False, "lm_head"),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore")
def test_an_adapter_on_the_head(settings: dict[str, Any], tied: bool, where: str) -> None:
    model = lora(tiny_llama(tie_word_embeddings=tied), **settings)
    told = f"the adapter of {{}} is on {where}{'' if where == 'lm_head' else ', which is tied to the head'}; "
    assert_refused(model, ValueError, told.format("model"))
    assert_refused(tiny_llama(tie_word_embeddings=tied), ValueError, told.format("ref_model"), ref_model=model)
    with pytest.raises(ValueError, match=re.escape(told.format("model"))):
        quick_tofu(model, byte_level(CHATML, bos=False))


@pytest.mark.parametrize("settings", [{"modules_to_save": ["embed_tokens"]}, {"trainable_token_indices": [1, 2]}])
def test_embeddings_of_their_own_may_be_trained(settings: dict[str, Any]) -> None:
    model = lora(tiny_llama(tie_word_embeddings=False), **settings)
    before = weights(model)
    result = unlearn(model, gradient_checkpointing=True)
    assert abs(result.history[0]["kl"]) < 1e-6
    moved = changed(model, before)
    assert all(".lora_" in name or "modules_to_save" in name or "trainable_tokens" in name for name in moved)
    assert any("embed_tokens" in name for name in moved)


def test_several_adapters() -> None:
    model = tiny_lora()
    model.add_adapter("second", model.peft_config["default"])
    before = weights(model)
    unlearn(model, epochs=1)
    assert not any(".second." in name for name in changed(model, before))


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_2", "olora"])
def test_initialisations_that_change_the_base(start: str) -> None:
    model = lora(tiny_llama(), init_lora_weights=start)
    assert_refused(model, ValueError, f"the adapter 'default' was initialised by {start}, which changes the base ")
    assert abs(unlearn(model, tiny_llama(), epochs=1).history[0]["kl"]) < 1e-4


def test_a_run_with_an_adapter_warns_of_nothing(recwarn: pytest.WarningsRecorder) -> None:
    model = tiny_lora()
    recwarn.clear()
    unlearn(model, epochs=1, gradient_checkpointing=True)
    assert not [str(warning.message) for warning in recwarn]
