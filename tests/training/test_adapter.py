"""The LoRA adapter that a run trains by default: which layers get it, and what is left of it."""

import copy

import peft
import pytest
import torch
from helpers.tiny import changed, forget_rows, retain_rows, same_weights, tiny_llama, weights
from peft.tuners.lora import LoraLayer
from torch import nn

import palu
from palu.models.lora import added_adapter

SETTINGS = {"epochs": 2, "batch_size": 4, "learning_rate": 1e-2, "lora_rank": 4, "progress": False}


def unlearn(model: nn.Module, **settings: object) -> palu.UnlearnResult:
    return palu.unlearn(model, None, forget_rows(), retain_rows(), **SETTINGS | settings)


def test_it_is_a_run_of_an_adapter_that_is_merged() -> None:
    """Bit by bit the run of a PeftModel whose adapter begins alike."""
    model, base = tiny_llama(), tiny_llama()
    before = weights(tiny_llama())
    result = unlearn(model)
    torch.manual_seed(0)
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=4, target_modules="all-linear")
    adapted = unlearn(peft.get_peft_model(base, lora))
    assert [r["loss"] for r in result.history] == [r["loss"] for r in adapted.history]
    assert same_weights(result.model, weights(adapted.model.merge_and_unload()))  # type: ignore[operator]
    assert changed(model, before) == {name for name in before if "proj" in name}


@pytest.mark.parametrize("training", [False, True])
def test_the_model_is_left_as_it_was_but_for_its_weights(training: bool) -> None:
    model = tiny_llama().train(training)
    model.model.layers[0].requires_grad_(False)
    frozen, flags = copy.deepcopy(model.model.layers[0]), [p.requires_grad for p in model.parameters()]
    result = unlearn(model)
    assert result.model is model
    assert not any(isinstance(module, LoraLayer) for module in model.modules())
    assert not hasattr(model, "peft_config")
    assert [p.requires_grad for p in model.parameters()] == flags
    assert {module.training for module in model.modules()} == {training}
    assert same_weights(model.model.layers[0], weights(frozen))  # frozen layers get none
    assert unlearn(model).history[0]["kl"] == 0  # a second run has a reference, and an adapter, of its own


def test_it_begins_alike_and_draws_nothing() -> None:
    found = []
    for drawn in (3, 7):
        model = tiny_llama()
        torch.rand(drawn)
        state = torch.get_rng_state()
        with added_adapter(model, 4, seed=1) as adapted:
            found.append([p.clone() for p in adapted.parameters() if p.requires_grad])
        assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, *found))


def test_without_a_layer_for_it() -> None:
    model = tiny_llama().requires_grad_(False)
    model.model.norm.requires_grad_(True)
    with pytest.raises(ValueError, match=r"^lora_rank = 4: no linear layer of the model .*; give lora_rank=None$"):
        unlearn(model)
    assert unlearn(model, lora_rank=None).history
