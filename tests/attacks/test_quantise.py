"""Rounding, against libraries and by what it leaves alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from helpers.planted import attack, data, never_saw, original, tokenizer
from helpers.tiny import same_weights, tiny_llama, weights
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

from palu.attacks.quantise import NF4_LEVELS, SCHEMES, Quantise, round_int4, round_int8, round_nf4, rounded
from palu.attacks.secrets import AuditData
from palu.models.head import body_of

bnb = pytest.importorskip("bitsandbytes.functional")

# Wide rows; rows that no group divides; a row and a block of zeros; one column.
SHAPES = [(8, 256), (5, 200), (3, 100), (4, 1), (2, 64)]


@pytest.fixture(params=SHAPES, ids=str)
def weight(request: pytest.FixtureRequest) -> torch.Tensor:
    made = torch.randn(request.param)
    made[1] *= 1e-4
    made[2:3] *= 30
    made[0, 64:128] = 0
    made[-1] = 0
    return made


def test_int8_is_that_of_bitsandbytes(weight: torch.Tensor) -> None:
    whole, scale, _ = bnb.int8_vectorwise_quant(weight.clone())
    theirs = whole.float() * scale[:, None] / 127
    torch.testing.assert_close(round_int8(weight), theirs, rtol=1e-5, atol=0)


def test_nf4_is_that_of_bitsandbytes(weight: torch.Tensor) -> None:
    torch.testing.assert_close(NF4_LEVELS, bnb.get_4bit_type("nf4", device="cpu"), rtol=0, atol=1e-6)
    flat = torch.nn.functional.pad(weight.flatten(), (0, -weight.numel() % 64))  # zeros change no block's magnitude
    theirs = bnb.dequantize_4bit(*bnb.quantize_4bit(flat, blocksize=64, quant_type="nf4"))
    theirs = theirs.flatten()[: weight.numel()].view_as(weight)
    torch.testing.assert_close(round_nf4(weight), theirs, rtol=1e-5, atol=1e-7)


def test_int4_is_torchs_fake_quantisation(weight: torch.Tensor) -> None:
    for row, ours in zip(weight, round_int4(weight), strict=True):
        for group, found in zip(row.split(128), ours.split(128), strict=True):
            low, high = float(group.min().clamp(max=0)), float(group.max().clamp(min=0))
            scale = (high - low) / 15
            if scale == 0:
                assert bool((found == 0).all())
                continue
            theirs = torch.fake_quantize_per_tensor_affine(group, scale, round(-low / scale), 0, 15)
            torch.testing.assert_close(found, theirs, rtol=1e-5, atol=0)
            assert len(found.unique()) <= 16


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_linear_layers_of_the_body_are_rounded(scheme: str, dtype: torch.dtype) -> None:
    model = tiny_llama(dtype=dtype)
    before = weights(model)
    with rounded(model, scheme):
        after = weights(model)
    modules = body_of(model).named_modules()
    linear = {f"model.{name}.weight" for name, module in modules if isinstance(module, torch.nn.Linear)}
    assert {name for name in before if not torch.equal(before[name], after[name])} == linear
    assert same_weights(model, before)
    with pytest.raises(KeyboardInterrupt), rounded(model, scheme):
        raise KeyboardInterrupt
    assert same_weights(model, before)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", ["Mixtral", "GptOss"])  # the weights of whose experts are [out, in] and [in, out]
def test_the_stacked_experts_of_a_mixture_are_rounded_one_by_one(kind: str, scheme: str) -> None:
    sizes = {"vocab_size": 97, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1, "head_dim": 8}
    heads = {"num_attention_heads": 3, "num_key_value_heads": 3, "num_local_experts": 3, "pad_token_id": 0}
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**sizes, **heads))
    before, (_, function) = weights(model), SCHEMES[scheme]
    with rounded(model, scheme):
        after = weights(model)
    for name in ("gate_up_proj", "down_proj"):
        stack = f"model.layers.0.mlp.experts.{name}"
        for expert, found in zip(before[stack], after[stack], strict=True):
            expected = function(expert.T).T if kind == "GptOss" else function(expert)
            assert torch.equal(found, expected) and not torch.equal(found, expert)
    assert same_weights(model, before) and Quantise(scheme, 24, 4).skip_reason(data(), model) is None


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"modules_to_save": ["down_proj"]}], ids=str)
@pytest.mark.parametrize("merge", [True, False])
def test_an_adapter_is_merged_before_rounding_or_stays_as_it_is_on_a_rounded_base(
    settings: dict[str, Any], merge: bool
) -> None:
    config = LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False, **settings)
    adapted = get_peft_model(tiny_llama(), config)
    for name, p in adapted.named_parameters():
        if "modules_to_save" in name or "magnitude" in name:
            p.data.mul_(1.5)  # begins as the base has it
    before, ids = weights(adapted), torch.arange(12)[None]
    expected = copy.deepcopy(adapted)
    if merge:
        expected = expected.merge_and_unload()
    for name, p in expected.named_parameters():
        layer = expected.get_submodule(name.rpartition(".")[0])
        if isinstance(layer, torch.nn.Linear) and not any(x in name for x in ("lora_", "modules_to_save", "lm_head")):
            p.data = round_int4(p.data)

    with torch.no_grad(), rounded(adapted, "int4", merge=merge):
        torch.testing.assert_close(adapted(input_ids=ids).logits, expected(input_ids=ids).logits)
    assert same_weights(adapted, before) and not adapted.get_model_status().merged_adapters
    with pytest.raises(KeyboardInterrupt), rounded(adapted, "int4", merge=merge):
        raise KeyboardInterrupt
    assert same_weights(adapted, before) and not adapted.get_model_status().merged_adapters


@pytest.mark.parametrize("scheme", SCHEMES)
def test_secrets_survive_rounding_and_utility_stands_beside(scheme: str) -> None:
    for model, share in ((original(), 1.0), (never_saw(), 0.0)):
        (finding,) = attack(Quantise(scheme, 24, 4), model)
        assert finding.name == f"quantise: {scheme}"
        assert finding.values == [share] * 6
        assert finding.figures["utility"] > 0.9 and finding.figures["utility unrounded"] > 0.9


def test_without_retain_rows_utility_is_of_the_models_own_answers() -> None:
    of = AuditData([{"question": "Who?", "answer": "It is Ada.", "spans": [[6, 9]]}], None, tokenizer())
    (finding,) = attack(Quantise("int4", 4, 3), original(), of)
    assert 0 < finding.figures["utility"] < 1
    (again,) = attack(Quantise("int4", 4, 3), original(), of)
    assert again == finding


def test_what_cannot_be_rounded_is_said() -> None:
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer()), n_embd=16, n_layer=1, n_head=2))
    reason = Quantise("int8", 24, 4).skip_reason(data(), gpt2)
    where = "in torch.nn.Linear and in experts of transformers, which alone can be rounded"
    assert reason == f"only 0% of the weights of GPT2LMHeadModel are {where}"
    quantised = tiny_llama()
    quantised.is_quantized, quantised.quantization_method = True, "bitsandbytes"
    reason = Quantise("int8", 24, 4).skip_reason(data(), quantised)
    assert reason == "the model is quantised already, by bitsandbytes, and every other row is of it in this form"
