"""Every bad input is refused with a message that names it and the fix, before one weight has changed."""

import copy
import json
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from helpers.refusals import assert_refused
from helpers.small_tokenizers import LLAMA3, byte_level
from helpers.tiny import VOCAB, forget_rows, retain_rows, same_weights, tiny_llama, weights
from torch import nn
from transformers import GraniteConfig, GraniteForCausalLM, LlamaForCausalLM

import palu
from palu.config import UnlearnConfig
from palu.models.checks import check_linear_head, check_models
from palu.models.head import HEAD_FIELDS

NAN, INF = float("nan"), float("inf")


# --- Settings ---
@pytest.mark.parametrize(
    "settings",
    [
        {"n": 1},
        {"local_loss": "topk_mse", "n": 1, "top_k": 1},
        {"local_loss": "topk_mse", "target": 0},
        {"local_loss": "topk_mse", "target": -3.5},
        {"probability_floor": 0},
        {"objective": "npo", "beta": 50},
        {"gamma": 0, "lambda_kl": 0, "lambda_retain": 0, "weight_decay": 0},
        {"retain_batch_size": 1, "max_length": 2, "warmup_steps": 0, "seed": 2**32 - 1},
        {"anchors": 0, "neighbours": 0, "variants": 0},
        {"chat_template_kwargs": {}},
        {"chat_template_kwargs": {"date_string": "26 Jul 2024", "tools": [{"a": [None, 1.5, False]}]}},
    ],
)
def test_settings_at_the_edge_are_valid(settings: dict) -> None:
    assert UnlearnConfig().replace(**settings) == UnlearnConfig(**settings)


def test_values_for_the_chat_template_are_not_shared() -> None:
    given = {"tools": ["one"]}
    config = UnlearnConfig(chat_template_kwargs=given)
    again, values = config.replace(n=1), config.values()
    json.dumps(values)
    assert hash(config) == hash(UnlearnConfig())
    given["tools"].append("two")
    values["chat_template_kwargs"]["tools"].append("three")
    assert again.chat_template_kwargs is not None
    again.chat_template_kwargs["tools"].append("four")
    assert config.chat_template_kwargs == {"tools": ["one"]} == config.values()["chat_template_kwargs"]


def test_a_learning_rate_schedule_that_does_not_exist() -> None:
    model = tiny_llama()
    before = weights(model)
    with pytest.raises(ValueError, match="zigzag"):
        palu.unlearn(model, None, forget_rows(), retain_rows(), lr_scheduler="zigzag", progress=False)
    assert same_weights(model, before)
    assert not model.training
    assert model.config._attn_implementation == "sdpa"


# --- Models ---
def test_a_vocabulary_padded_beyond_the_tokenizer_is_fine() -> None:
    tokenizer = byte_level(LLAMA3)
    model = tiny_llama(vocab_size=len(tokenizer) + 5)
    check_models(model, copy.deepcopy(model), tokenizer, Accelerator().device, "no")


def test_fp16_mixed_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    # An Accelerator with fp16 would change the state that all others share, and wants an accelerator.
    monkeypatch.setattr(Accelerator, "mixed_precision", property(lambda _: "fp16"))
    assert_refused(tiny_llama(), ValueError, "mixed precision fp16 ")


def granite(**config: Any) -> GraniteForCausalLM:
    """A model of transformers whose logits are divided by `logits_scaling`."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": None}
    return GraniteForCausalLM(GraniteConfig(**sizes, **heads, pad_token_id=0, initializer_range=0.3, **config)).eval()


class SoftCapped(LlamaForCausalLM):
    """Logits capped as Gemma 2's are."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = 2 * torch.tanh(output.logits / 2)
        return output


NOT_THE_HEAD = "the logits of {} are not its output layer applied to its last hidden states, scaled by {} and {} as "


class Scaled(LlamaForCausalLM):
    """Logits scaled by what no configuration tells."""

    factor = 1.0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * self.factor
        return output


@pytest.mark.parametrize(("dtype", "factor"), [(torch.float32, 1.0001), (torch.bfloat16, 1.02)], ids=str)
def test_a_factor_beyond_the_error_of_the_dtype(dtype: torch.dtype, factor: float) -> None:
    model = Scaled(tiny_llama().config).to(dtype)
    check_linear_head(model, torch.arange(20))
    model.factor = factor
    assert_refused(model, ValueError, NOT_THE_HEAD.format("Scaled", 1, "not capped"))


def test_the_parts_of_a_model_keep_their_modes() -> None:
    model = tiny_llama().train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    check_linear_head(model, torch.arange(20))
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize("size", [1.0, 1e-3])
def test_a_cap_that_no_configuration_tells(size: float) -> None:
    """Also where the logits are too small to show it: 1e-3 of them, and the cap changes 1e-7 of that."""
    model = SoftCapped(tiny_llama().config)
    with torch.no_grad():
        model.model.norm.weight *= size
    assert_refused(model, ValueError, NOT_THE_HEAD.format("SoftCapped", 1, "not capped"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training", [False, True])
def test_linear_heads_pass(dtype: torch.dtype, training: bool) -> None:
    """With dropout, which draws again in every pass, and with a bias too."""
    model = tiny_llama(attention_dropout=0.5, tie_word_embeddings=False)
    model.lm_head = nn.Linear(32, VOCAB, bias=True)
    ids = torch.arange(20)
    check_linear_head(model.to(dtype).train(training), ids)
    assert model.training == training
    check_linear_head(granite(logits_scaling=1.0).to(dtype), ids)


@pytest.mark.parametrize("scaling", [8.0, 6.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_scaled_heads_pass(scaling: float, dtype: torch.dtype) -> None:
    check_linear_head(granite(logits_scaling=scaling).to(dtype), torch.arange(20))


@pytest.mark.parametrize("field", HEAD_FIELDS)
def test_a_field_that_the_model_does_not_read(field: str) -> None:
    """Gemma 3 with images has a cap in its configuration, and does not apply it."""
    model = tiny_llama()
    with torch.no_grad():
        model.model.norm.weight *= 1e-3  # too small to show a cap of 30
    for value in (None, *([1] if HEAD_FIELDS[field] != "cap" else [])):
        setattr(model.config, field, value)
        check_linear_head(model, torch.arange(20))
    setattr(model.config, field, 32.0)
    scale = {"cap": "1", "multiply": "32", "divide": "0.03125"}[HEAD_FIELDS[field]]
    cap = "capped at 32" if HEAD_FIELDS[field] == "cap" else "not capped"
    assert_refused(model, ValueError, NOT_THE_HEAD.format("LlamaForCausalLM", scale, cap))


@pytest.mark.parametrize("value", [0, -1.0, "inv_sqrt_d_model", True, NAN, INF])
def test_a_field_that_is_no_positive_number(value: Any) -> None:
    """MPT's `logit_scale` may be a name."""
    model = tiny_llama()
    model.config.logit_scale = value
    assert_refused(model, ValueError, f"logit_scale = {value!r} in the configuration of LlamaForCausalLM: ")
