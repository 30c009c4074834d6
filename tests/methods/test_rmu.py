"""RMU: what it trains, draws, asks of the reference, and refuses. Its formula is tested in test_baselines.py."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.runs import unlearn
from helpers.tiny import changed, retain_rows, same_weights, tiny_llama, weights
from transformers import LlamaForCausalLM

import palu
from palu.config import UnlearnConfig
from palu.training.engine import check_deepspeed


def deep_llama() -> LlamaForCausalLM:
    return tiny_llama(num_hidden_layers=3, tie_word_embeddings=False)


def rmu(model: Any, **settings: Any) -> palu.UnlearnResult:
    return unlearn(model, objective="rmu", **{"epochs": 2, "layer_id": 1} | settings)


def losses(result: palu.UnlearnResult) -> list[float]:
    return [record["loss"] for record in result.history]


def changed_by_rmu(model: LlamaForCausalLM, **settings: Any) -> set[str]:
    before = weights(model)
    rmu(model, **settings)
    return changed(model, before)


def test_rmu_trains_no_weight_above_its_layer() -> None:
    for settings in ({}, {"weight_decay": 0.1}):
        moved = changed_by_rmu(deep_llama(), **settings)
        assert {name.split(".")[2] for name in moved} == {"weight", "0", "1"}, "the embeddings and two layers"


@pytest.mark.parametrize("reentrant", [False, True])
def test_rmu_checkpoints_activations_and_comes_out_the_same(reentrant: bool) -> None:
    plain, checkpointed = deep_llama(), deep_llama()
    name = "activation" if hasattr(checkpointed, "activation_checkpointing_enable") else "gradient"
    getattr(checkpointed, f"{name}_checkpointing_enable")({"use_reentrant": reentrant})
    assert losses(rmu(plain)) == losses(rmu(checkpointed))
    assert same_weights(plain, weights(checkpointed))


def test_rmu_on_the_weights_of_the_paper() -> None:
    """The down projections of the layer and of the one below; all others are frozen by the user."""
    model = deep_llama()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(re.search(r"layers\.[01]\.mlp\.down_proj", name) is not None)
    assert changed_by_rmu(model) == {f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1)}


def test_rmu_draws_its_vector_by_the_seed() -> None:
    first = [rmu(deep_llama(), seed=seed, epochs=1, batch_size=8).history[0]["forget"] for seed in (0, 0, 1)]
    assert first[0] == first[1] != first[2]


def test_rmu_asks_again_where_the_retain_set_or_the_layer_is_another_one(tmp_path: Path) -> None:
    runs: list[dict[str, Any]] = [{}, {"retain": retain_rows(seed=9)}, {"layer_id": 0}]
    plain = [rmu(deep_llama(), **run) for run in runs]
    for _ in range(2):  # the second time from what is there
        cached = [rmu(deep_llama(), cache_dir=str(tmp_path), **run) for run in runs]
        assert len(list(tmp_path.iterdir())) == 3
        for one, other in zip(plain, cached, strict=True):
            assert losses(one) == losses(other)
            assert same_weights(one.model, weights(other.model))


def test_layers_that_rmu_cannot_steer() -> None:
    frozen, doubled = deep_llama(), deep_llama()
    for name, parameter in frozen.named_parameters():
        parameter.requires_grad_("layers.2" in name)
    doubled.model.layers = torch.nn.ModuleList([*doubled.model.layers, doubled.model.layers[0]])
    for model, layer, told in (
        (deep_llama(), 7, "^layer_id = 7: the model has 3 layers; give one of 0 to 2$"),
        (frozen, 1, "^layer_id = 1: no parameter of the layers up to it requires a gradient"),
        (doubled, 1, "LlamaModel has no one list of as many layers as its configuration says"),
    ):
        with pytest.raises(ValueError, match=told):
            rmu(model, layer_id=layer)


def test_rmu_under_deepspeed_is_refused() -> None:
    check_deepspeed(UnlearnConfig())
    with pytest.raises(ValueError, match=r"^objective = 'rmu' trains the lower layers alone, "):
        check_deepspeed(UnlearnConfig(objective="rmu"))
