"""Every bad input is refused with a message that names it and the fix, before one weight has changed."""

import copy
import datetime
import json
import re
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from helpers.refusals import NOT_CAUSAL, assert_refused
from helpers.small_tokenizers import LLAMA3, byte_level
from helpers.tiny import VOCAB, forget_rows, retain_rows, same_weights, tiny_llama, weights
from torch import nn
from transformers import GraniteConfig, GraniteForCausalLM, LlamaForCausalLM, LlamaModel

import palu
from palu.config import UnlearnConfig, readers_of
from palu.models.checks import check_linear_head, check_models
from palu.models.head import HEAD_FIELDS
from palu.models.lora import UnsupportedModelError

POSITIVE = "give a positive integer"
NOT_NEGATIVE = "give a number that is not negative"
NAN, INF = float("nan"), float("inf")


# ---------------------------------------------------------------------------------------------------
# Settings


BAD_SETTINGS = [
    ("n", value, "give a positive integer, or -1 for whole spans") for value in (0, -2, 1.5, "3", None, True)
]
BAD_SETTINGS += [("top_k", value, POSITIVE) for value in (0, -1, 5.0, "all", None, True)]
BAD_SETTINGS += [
    ("target", value, "give one of global_mean, global_mean_detached, local_mean, or a finite number")
    for value in ("mean", "", NAN, INF, None, True)
]
BAD_SETTINGS += [("local_loss", value, "give one of topk_mse, unlikelihood") for value in ("entropy", None, 1)]
BAD_SETTINGS += [
    ("probability_floor", value, "give a number from 0 to below 1") for value in (-0.1, 1, NAN, "0.1", None, True)
]
BAD_SETTINGS += [
    (name, value, 'read by local_loss = "topk_mse" alone; give that, too, or leave it out')
    for name, value in (("top_k", 50), ("target", "local_mean"), ("normalize", False))
]
BAD_SETTINGS += [("kl_direction", value, "give one of forward, reverse") for value in ("both", None, 1)]
BAD_SETTINGS += [("kl_prompt", value, "give one of own, other") for value in ("none", None, True)]
BAD_SETTINGS += [
    (name, value, NOT_NEGATIVE)
    for name in ("gamma", "lambda_kl", "lambda_retain", "weight_decay", "dual_step", "retain_loss_bound")
    for value in (-0.1, NAN, INF, "1", True)
]
BAD_SETTINGS += [
    (
        "objective",
        value,
        "give one of palu, ga, gd, dpo, npo, simnpo, pdu, tpo, wga, satimp, undial, rmu, or a class of method",
    )
    for value in ("NPO", "", None, 1)
]
BAD_SETTINGS += [
    (name, value, "give True or False")
    for name in ("normalize", "allow_cut_spans", "gradient_checkpointing", "merge_adapter", "resume", "progress")
    for value in (None, 1, "yes")
]
BAD_SETTINGS += [("beta", value, "give a positive number") for value in (0, -1, NAN, "1", True)]
BAD_SETTINGS += [("layer_id", value, "give 0 or a positive integer") for value in (-1, 1.0, "7", None, True)]
BAD_SETTINGS += [("delta", value, "give a finite number") for value in (NAN, INF, "1", None)]
BAD_SETTINGS += [
    (name, value, "give a positive number")
    for name in ("learning_rate", "max_grad_norm", "steering_coeff")
    for value in (0, -1e-5, NAN, INF, "1", None)
]
BAD_SETTINGS += [
    (name, value, POSITIVE)
    for name in ("epochs", "batch_size", "gradient_accumulation_steps", "chunk_bytes")
    for value in (0, -1, 1.0, None)
]
BAD_SETTINGS += [
    (name, value, f"give a positive integer, or None for {none}")
    for name, none in (
        ("retain_batch_size", "batch_size"),
        ("kl_rows", "all ordinary tokens"),
        ("max_tokens", "no bound"),
        ("max_steps", "epochs"),
        ("eval_steps", "one before and one after"),
    )
    for value in (0, -1, 2.0)
]
BAD_SETTINGS += [("anchors", value, "give 0 or a positive integer, or None") for value in (-1, 2.0, True, "all")]
BAD_SETTINGS += [("max_length", value, "give an integer above 1") for value in (1, 0, -1, 10.0, None)]
BAD_SETTINGS += [("warmup_steps", value, "give 0 or a positive integer") for value in (-1, 0.5, None)]
BAD_SETTINGS += [("seed", value, "give an integer in [0, 2**32)") for value in (-1, 2**32, 1.0, None)]
BAD_SETTINGS += [
    ("stop_probability", value, "give a number between 0 and 1, or None") for value in (0, 1, -1, NAN, "0.1")
]

BAD_SETTINGS += [
    ("chat_template_kwargs", value, "give a mapping of names to values, or None")
    for value in ("{}", [], 1, True, {1: 2})
]
BAD_SETTINGS += [
    ("chat_template_kwargs", value, "give values that JSON has (text, numbers, lists, ...); a date is text")
    for value in ({"date_string": datetime.date(2024, 7, 26)}, {"x": NAN}, {"x": {1, 2}})
]
BAD_SETTINGS += [
    ("chat_template_kwargs", {name: True}, f"leave out {name}, which palu sets itself")
    for name in ("add_generation_prompt", "continue_final_message", "conversation", "tokenize")
]


@pytest.mark.parametrize(("name", "value", "rule"), BAD_SETTINGS)
def test_settings_that_are_not_valid(name: str, value: Any, rule: str) -> None:
    message = f"{name} = {value!r}: {rule}"
    readers = readers_of(name)
    objective = {"objective": readers[0]} if readers and name != "objective" else {}
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        UnlearnConfig(**objective, **{name: value})
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        UnlearnConfig(**objective).replace(**{name: value})


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
        {"stop_probability": 0.5},
        {"anchors": 0},
        {"chat_template_kwargs": {}},
        {
            "chat_template_kwargs": {
                "date_string": "26 Jul 2024",
                "enable_thinking": False,
                "tools": [{"a": [None, 1.5]}],
            }
        },
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


# ---------------------------------------------------------------------------------------------------
# Models


class Wrapped(nn.Module):
    """A causal language model inside something else."""

    def __init__(self) -> None:
        super().__init__()
        self.model = tiny_llama()


@pytest.mark.parametrize("build", [lambda: LlamaModel(tiny_llama().config), Wrapped, lambda: nn.Linear(2, 2)])
def test_a_model_that_is_not_a_causal_language_model(build: Any) -> None:
    other = build()
    name = type(other).__name__
    assert_refused(other, UnsupportedModelError, NOT_CAUSAL.format("model", name))
    assert_refused(tiny_llama(), UnsupportedModelError, NOT_CAUSAL.format("ref_model", name), ref_model=other)


def test_a_vocabulary_padded_beyond_the_tokenizer_is_fine() -> None:
    tokenizer = byte_level(LLAMA3)
    model = tiny_llama(vocab_size=len(tokenizer) + 5)
    check_models(model, copy.deepcopy(model), tokenizer, Accelerator().device, "no")


def test_fp16_mixed_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    # An Accelerator with fp16 would change the state that all others share, and wants an accelerator.
    monkeypatch.setattr(Accelerator, "mixed_precision", property(lambda _: "fp16"))
    message = "mixed precision fp16 underflows in the gradient of the losses; use bf16 or no mixed precision"
    assert_refused(tiny_llama(), ValueError, message)


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


NOT_THE_HEAD = (
    "the logits of {} are not its output layer applied to its last hidden states, scaled by {} and {} as its "
    "configuration says, so losses from hidden states would be wrong; load a model of a kind that docs/models.md lists "
    "as supported"
)


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
    message = (
        f"logit_scale = {value!r} in the configuration of LlamaForCausalLM: palu reads it as what the logits are "
        "scaled by or capped at, and knows positive numbers only"
    )
    assert_refused(model, ValueError, message)
