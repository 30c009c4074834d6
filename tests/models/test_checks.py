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
from transformers import LlamaForCausalLM

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


NOT_THE_HEAD = "the logits of {} are not its output layer applied to its last hidden states, scaled by {} and {} as "


class Changed(LlamaForCausalLM):
    """Logits that are scaled, or capped as Gemma 2's are, by what no configuration tells."""

    factor, cap = 1.0, None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        logits = output.logits * self.factor
        output.logits = logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)
        return output


@pytest.mark.parametrize(
    ("dtype", "factor", "cap", "size"),
    [
        (torch.float32, 1.0001, None, 1.0),
        (torch.bfloat16, 1.02, None, 1.0),  # a factor beyond the error of the dtype
        (torch.float32, 1.0, 2.0, 1.0),
        (torch.float32, 1.0, 2.0, 1e-3),  # logits too small to show a cap, which changes 1e-7 of them
    ],
)
def test_logits_that_are_scaled_or_capped_beyond_the_configuration(
    dtype: torch.dtype, factor: float, cap: float | None, size: float
) -> None:
    model = Changed(tiny_llama().config).to(dtype)
    with torch.no_grad():
        model.model.norm.weight *= size
    check_linear_head(model, torch.arange(20))
    model.factor, model.cap = factor, cap
    assert_refused(model, ValueError, NOT_THE_HEAD.format("Changed", 1, "not capped"))


@pytest.mark.parametrize(("dtype", "training"), [(torch.float32, False), (torch.bfloat16, True)], ids=str)
def test_linear_heads_pass(dtype: torch.dtype, training: bool) -> None:
    """With dropout, which draws again in every pass, and with a bias. The parts of the model keep their modes."""
    model = tiny_llama(attention_dropout=0.5, tie_word_embeddings=False)
    model.lm_head = nn.Linear(32, VOCAB, bias=True)
    model.to(dtype).train(training).model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    check_linear_head(model, torch.arange(20))
    assert [module.training for module in model.modules()] == modes


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
