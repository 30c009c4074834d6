"""Heads whose logits are scaled or capped: palu's logits, losses, runs and scores are those of the model itself."""

from typing import Any, NamedTuple

import pytest
import torch
import transformers
from helpers import textbook
from helpers.runs import unlearn
from helpers.tiny import VOCAB
from peft import LoraConfig, get_peft_model
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel

from palu.data.examples import load_retain
from palu.evaluate.scores import token_scores
from palu.methods import METHODS
from palu.models.checks import check_linear_head
from palu.models.head import body_of, head_of
from palu.models.lora import CausalLM

SIZES = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.3}
SIZES |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}


class Kind(NamedTuple):
    """A model, and what its head does."""

    config: str  # transformers' class
    settings: dict[str, Any]
    scale: float
    softcap: float | None

    def build(self, dtype: torch.dtype = torch.float64, **changes: Any) -> PreTrainedModel:
        torch.manual_seed(0)
        config = getattr(transformers, self.config)(**SIZES | self.settings | changes)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
        return model.to(dtype)


FIGURES = ("loss", "forget", "retain", "grad_norm")
GEMMA2 = Kind("Gemma2Config", {"final_logit_softcapping": 3.0, "tie_word_embeddings": False}, 1, 3)
GEMMA3 = Kind("Gemma3TextConfig", {"final_logit_softcapping": 20.0}, 1, 20)
GRANITE = Kind("GraniteConfig", {"logits_scaling": 6.0}, 1 / 6, None)
COHERE = Kind("CohereConfig", {"logit_scale": 0.0625}, 0.0625, None)
TRAINED = [GEMMA2, GEMMA3, GRANITE, COHERE]
KINDS = [  # others are in test_packing_probe.py
    *TRAINED,
    Kind("Gemma2Config", {"final_logit_softcapping": None}, 1, None),
    Kind("HyperCLOVAXConfig", {"logits_scaling": 0.25}, 0.25, None),  # the field of Granite, the other way round
    Kind("RecurrentGemmaConfig", {"logits_soft_cap": 5.0, "lru_width": 32}, 1, 5),
    Kind("FalconH1Config", MAMBA | {"lm_head_multiplier": 0.4}, 0.4, None),
]


def name(kind: Kind) -> str:
    return f"{kind.config}, {kind.scale:.3g}, {kind.softcap}"


def own_logits(model: PreTrainedModel, states: Tensor) -> Tensor:
    """The logits [R, V] that the model's own code forms of hidden states [R, d]."""

    def replace(module: Any, given: Any, output: Any) -> Any:
        output.last_hidden_state = states[None]
        return output

    hook = body_of(model).register_forward_hook(replace)
    logits = model(input_ids=torch.zeros(1, len(states), dtype=torch.int64), use_cache=False).logits[0]
    hook.remove()
    return logits


@pytest.mark.parametrize("kind", KINDS, ids=name)
def test_the_head_is_read_from_the_configuration(kind: Kind) -> None:
    model = kind.build()
    head = head_of(model)
    assert head.scale == pytest.approx(kind.scale, rel=1e-12)
    assert head.softcap == kind.softcap
    states = torch.randn(20, 32, dtype=torch.float64, requires_grad=True)
    ours, theirs = head.logits(states), own_logits(model, states)
    assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-12)
    slopes = [torch.autograd.grad(z.square().sum(), (states, head.weight)) for z in (ours, theirs)]
    assert all(torch.allclose(*pair, rtol=1e-9, atol=1e-9) for pair in zip(*slopes, strict=True))
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        check_linear_head(kind.build(dtype), torch.arange(20))
    with torch.autocast("cpu", torch.bfloat16):
        check_linear_head(kind.build(torch.float32), torch.arange(20))


# --- Runs; test_packing_probe.py has ten steps of every kind ---


@pytest.mark.parametrize(
    ("kind", "changes"), [(GRANITE, {"logits_scaling": 16.0}), (GEMMA2, {"final_logit_softcapping": None})]
)
def test_ten_steps_with_a_reference_of_its_own_scale_or_cap(kind: Kind, changes: dict[str, Any]) -> None:
    """And of a LoRA adapter, whose reference is the base model: its head is the model's own."""
    with textbook.Doubled():
        ref_model = kind.build(**changes)
        textbook.assert_unlearn_equals(kind.build(), ref_model=ref_model, tolerance=1e-8, local_loss="topk_mse")
        settings = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights="gaussian")
        model: CausalLM = get_peft_model(kind.build(), settings)
        textbook.assert_unlearn_equals(model.double(), tolerance=1e-8, local_loss="topk_mse")


@pytest.mark.parametrize("objective", [name for name in METHODS if name not in ("palu", "dpo")])
def test_other_objectives_see_the_scaled_logits(objective: str) -> None:
    """A sixth of the logits is what a head with a sixth of the weights gives. DPO, on text only, is NPO's code."""
    scaled, plain = GRANITE.build(tie_word_embeddings=False), GRANITE.build(tie_word_embeddings=False)
    plain.config.logits_scaling = 1.0
    with torch.no_grad():
        plain.lm_head.weight /= 6
    forget, retain = (textbook.rows(VOCAB, sensitive=sensitive) for sensitive in (True, False))
    histories = []
    for model in (scaled, plain):
        model.lm_head.weight.requires_grad_(False)
        result = unlearn(model, None, forget, retain, objective=objective)
        histories.append([[record[name] for name in FIGURES] for record in result.history])
    assert histories[0] == [pytest.approx(record, rel=1e-5) for record in histories[1]]


# --- Evaluation ---
@pytest.mark.parametrize("kind", TRAINED, ids=name)
def test_scores_are_those_of_the_models_logits(kind: Kind) -> None:
    model = kind.build(torch.float32)
    rows = textbook.rows(VOCAB, sensitive=False)
    examples = load_retain(rows, None, max_length=100).examples
    names = [f"row {i}" for i in range(len(rows))]
    scores = token_scores(model, examples, names, batch_tokens=1000, bar=tqdm(disable=True))
    for row, score in zip(rows, scores, strict=True):
        answer = torch.tensor(row["labels"])[1:]
        logits = textbook.logits(model, row)[:-1][answer >= 0]
        expected = logits.log_softmax(1).gather(1, answer[answer >= 0, None])[:, 0]
        assert torch.allclose(score.log_prob, expected.detach(), atol=1e-4)
        assert torch.equal(score.correct, logits.argmax(1) == answer[answer >= 0])
