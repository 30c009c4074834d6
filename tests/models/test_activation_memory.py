"""The formulas of docs/memory.md for the activations that a layer keeps are those of torch."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

D, K, F, TOKENS = 256, 128, 896, 64  # width, key width and MLP width


def kept_per_token(dtype: torch.dtype, adapted: bool) -> float:
    """Bytes that one layer keeps for the backward pass, for each token."""
    sizes = {"hidden_size": D, "intermediate_size": F, "num_attention_heads": 8, "num_key_value_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1, vocab_size=8)).to(dtype)
    (layer,) = model.model.layers
    if adapted:
        peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    states = torch.randn(1, TOKENS, D, dtype=dtype, requires_grad=True)
    angles = torch.randn(1, TOKENS, D // 8, dtype=dtype)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = layer(states, position_embeddings=(angles, angles))  # noqa: F841  # it keeps them alive
    for tensor in (*layer.parameters(), angles):  # weights are no activations
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(kept.values()) / TOKENS


@pytest.mark.parametrize(
    ("dtype", "adapted", "formula"),
    [
        (torch.float32, False, 32 * D + 8 * K + 16 * F),
        (torch.bfloat16, False, 20 * D + 4 * K + 8 * F),
        (torch.float32, True, 24 * D + 8 * K + 16 * F),
        (torch.bfloat16, True, 36 * D + 4 * K + 10 * F),
    ],
)
def test_what_a_layer_keeps_for_the_backward_pass(dtype: torch.dtype, adapted: bool, formula: int) -> None:
    assert kept_per_token(dtype, adapted) == pytest.approx(formula, rel=0.03)
