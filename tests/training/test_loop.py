"""palu.unlearn on a tiny Llama: what it changes, what it leaves alone, and which runs are equal."""

import importlib.util
import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from helpers.runs import live_bytes, result_config, unlearn
from helpers.tiny import (
    Row,
    answer_probabilities,
    forget_rows,
    overfit,
    retain_rows,
    same_weights,
    tiny_llama,
    weights,
)
from torch import Tensor
from transformers import LlamaForCausalLM

import palu
from palu.config import UnlearnConfig
from palu.data.examples import load_forget
from palu.data.packing import forget_items
from palu.methods.base import FEWEST_STEPS
from palu.methods.palu import PaluMethod
from palu.models.root import ModelRoot
from palu.ref_model.anchors import AnchorPrompts
from palu.ref_model.precompute import precompute_reference
from palu.training.step import ending

FIELDS = {"step", "epoch", "loss", "local", "kl", "retain", "grad_norm", "learning_rate", "tokens", "tokens_per_second"}


# --- What a run gives, and what it leaves alone ---
def test_history_and_summary() -> None:
    model = tiny_llama()
    config = UnlearnConfig(n=2, epochs=7, lambda_kl=2.0)
    result = unlearn(model, config=config, epochs=2, batch_size=3, n=2)
    assert result.model is model
    last = ", ".join(f"{name} {result.history[-1][name]:.3g}" for name in ("loss", "local", "kl", "retain"))
    assert repr(result) == str(result) == f"UnlearnResult(steps 6, {last})"
    assert [record["step"] for record in result.history] == list(range(1, 7))
    assert [record["epoch"] for record in result.history] == [1, 1, 1, 2, 2, 2]
    for record in result.history:
        assert record.keys() == FIELDS
        assert all(math.isfinite(value) for value in record.values())
        assert record["loss"] == pytest.approx(record["local"] + 2 * record["kl"] + record["retain"])
        assert record["learning_rate"] == 1e-3
        assert record["tokens_per_second"] > 0
    items = forget_items(load_forget(forget_rows(), None, max_length=1024).examples, 2, None)
    summary = result.summary
    assert summary["forget_examples"] == 8
    assert summary["forget_without_span"] == summary["forget_skipped"] == summary["retain_skipped"] == 0
    assert summary["retain_examples"] == 12
    assert summary["onset_tokens"] == sum(item.targets for item in items)
    assert summary["ordinary_tokens"] == sum(label == -200 for row in forget_rows() for label in row["labels"])
    assert (summary["steps"], summary["epochs"], summary["ended_by"]) == (6, 2, None)
    # Overrides replace fields of the configuration given, helper's defaults among them.
    assert (summary["config"]["n"], summary["config"]["epochs"], summary["config"]["top_k"]) == (2, 2, 20)
    json.dumps(result.history)
    json.dumps(summary)


@pytest.mark.parametrize(
    ("attention", "checkpointing", "training", "fails"),
    [
        ("sdpa", True, False, False),
        ("eager", True, True, False),
        ("sdpa", False, True, True),
        ("sdpa", True, False, True),
    ],
)
def test_what_was_set_is_set_back(
    attention: str, checkpointing: bool, training: bool, fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ref_model = tiny_llama(attention=attention), tiny_llama(seed=1, attention=attention)
    model.train(training)
    ref_model.train(not training)
    ref_before = weights(ref_model)
    if fails:
        monkeypatch.setattr("palu.training.datasets.UnlearnDataLoader", None)  # it is called
    with pytest.raises(TypeError, match="NoneType") if fails else nullcontext():
        unlearn(model, ref_model, epochs=1, gradient_checkpointing=checkpointing)
    assert model.training == training
    assert ref_model.training != training
    assert ref_model.device.type == "cpu"
    assert same_weights(ref_model, ref_before)
    assert all(parameter.grad is None for parameter in (*model.parameters(), *ref_model.parameters()))
    for each in (model, ref_model):
        assert each.config._attn_implementation == attention
        assert not any(getattr(m, "gradient_checkpointing", False) for m in each.modules())


def test_checkpointing_that_was_on_stays_on() -> None:
    model = tiny_llama()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
    unlearn(model, epochs=1, gradient_checkpointing=True)
    assert any(getattr(m, "gradient_checkpointing", False) for m in model.modules())


def test_no_module_takes_the_place_of_a_function() -> None:
    """Importing a submodule sets its name on the package: none may be called as a public function is."""
    for name in palu.__all__:
        assert name in (*palu._SUBMODULES, "__version__") or importlib.util.find_spec(f"palu.{name}") is None, name


# --- It unlearns ---
@pytest.fixture(scope="module")
def knowing() -> dict[str, Tensor]:
    """Weights of a model that knows every answer by heart."""
    model = tiny_llama()
    overfit(model, forget_rows() + retain_rows())
    assert answer_probabilities(model, forget_rows() + retain_rows()).min() > 0.8
    return weights(model)


@pytest.mark.parametrize(
    "settings",
    [
        {"kl_direction": "forward", "n": 1},
        {"target": "local_mean"},
        {"target": -2.0, "n": -1},
        {"target": "global_mean_detached", "top_k": 1},
        {"local_loss": "unlikelihood"},
    ],
    ids=str,
)
def test_secrets_go_and_the_rest_stays(knowing: dict[str, Tensor], settings: dict) -> None:
    model = tiny_llama()
    model.load_state_dict(knowing)
    result = unlearn(model, learning_rate=3e-3, lambda_kl=1.0, epochs=15, **settings)
    first, last = result.history[0], result.history[-1]
    assert last["local"] < 0.2 * first["local"]
    # The first token of every span is an onset token whatever n is.
    items = forget_items(load_forget(forget_rows(), None, max_length=1024).examples, 1, None)
    rows: list[Row] = []
    for row, item in zip(forget_rows(), items, strict=True):
        onset = {int(t) + 1 for t in item.rows[: item.targets]}
        labels = [token if t in onset else -200 for t, token in enumerate(row["input_ids"])]
        rows.append({"input_ids": row["input_ids"], "labels": [-100, *labels[1:]]})
    model.cpu()
    assert answer_probabilities(model, rows, sensitive_only=True).mean() < 0.2
    assert answer_probabilities(model, retain_rows()).mean() > 0.8


def test_it_ends_when_all_is_forgotten(knowing: dict[str, Tensor]) -> None:
    """That is, after the fewest steps, when every onset token stayed below .2 for two epochs."""
    model = tiny_llama()
    model.load_state_dict(knowing)
    settings: dict[str, Any] = {"learning_rate": 3e-3, "lambda_kl": 4.0, "local_loss": "unlikelihood"}
    settings["epochs"] = None
    result = unlearn(model, **settings)
    assert result.summary["ended_by"] == "forgotten"
    epochs, config = result.summary["epochs"], result_config(result)
    assert config.epochs > epochs > 2
    records = [[r for r in result.history if r["epoch"] == epoch] for epoch in range(1, epochs + 1)]
    below = [max(r["onset_probability"] for r in epoch) < config.method.ends_below for epoch in records]
    assert not below[0], "it took more than one epoch"
    steps = [sum(map(len, records[: i + 1])) for i in range(epochs)]
    ends = [below[i - 1] and below[i] and steps[i] >= FEWEST_STEPS for i in range(1, epochs)]
    assert ends == [False] * (epochs - 2) + [True], "and no sooner"


@pytest.mark.parametrize(
    ("ended_by", "highest", "neighbours", "said"),
    [
        ("forgotten", 0.03, 5, "palu: 3 steps; no token to be forgotten is above 0.2 among its candidates any more"),
        (
            None,
            0.34,
            None,
            "the likeliest token to be forgotten had 0.34 among its candidates; allow more epochs, or",
        ),
        (None, 0.03, 0, "had 0.03 among its candidates. The reference wrote no question like those to be forgotten:"),
        ("callback", 0.34, None, "palu: 3 steps; ended by callback"),
    ],
)
def test_the_last_line(ended_by: str | None, highest: float, neighbours: int | None, said: str) -> None:
    history = [{"epoch": epoch, "onset_probability": p} for epoch, p in ((1, 0.9), (2, highest), (2, highest / 2))]
    assert said in ending(history, ended_by, UnlearnConfig().method, neighbours=neighbours)


@pytest.mark.parametrize(
    ("settings", "epochs"),
    [
        ({"probability_floor": 0.99, "batch_size": 1, "epochs": 7}, 6),  # eight steps an epoch
        ({"probability_floor": 0.99, "batch_size": 1, "epochs": 7, "gamma": 0}, 7),  # nothing was to be forgotten
        ({"probability_floor": 0.99}, 3),  # six steps
        ({"objective": "npo", "batch_size": 1, "epochs": 7}, 7),
    ],
    ids=str,
)
def test_when_a_run_ends_by_itself(settings: dict[str, Any], epochs: int) -> None:
    own = {} if "objective" in settings else {"local_loss": "unlikelihood"}
    result = unlearn(tiny_llama(), **own | settings)
    assert result.summary["epochs"] == epochs
    assert (result.summary["ended_by"] == "forgotten") == (epochs == 6)


@pytest.mark.parametrize(
    ("settings", "most"),
    [
        ({}, 16),
        ({"probability_floor": 0.0}, 8),
        ({"local_loss": "topk_mse"}, 8),
        ({"objective": "npo"}, 8),
        ({"epochs": 3}, 3),
    ],
)
def test_the_methods_epochs(settings: dict[str, Any], most: int) -> None:
    assert UnlearnConfig(**settings).total_steps(12) == 12 * most
    assert UnlearnConfig(**settings).total_steps(1) == (2 * FEWEST_STEPS if most == 16 else most)


@pytest.mark.parametrize(
    ("settings", "rates"),
    [
        ({"epochs": 3, "batch_size": 4, "warmup_steps": 2}, [0, 0.5e-3, 1e-3, 0.75e-3, 0.5e-3, 0.25e-3]),
        ({"max_steps": 5}, [1e-3, 0.8e-3, 0.6e-3, 0.4e-3, 0.2e-3]),
    ],
)
def test_warmup_and_schedule(settings: dict[str, Any], rates: list[float]) -> None:
    history = unlearn(tiny_llama(), lr_scheduler="linear", **settings).history
    assert [record["learning_rate"] for record in history] == pytest.approx(rates)


# --- The head of the reference ---
@pytest.mark.parametrize("trainable", [True, False])
def test_a_frozen_head_is_shared_and_a_trainable_one_copied(trainable: bool) -> None:
    objectives = []

    class Spy(PaluMethod):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            objectives.append(self)

    model = tiny_llama(tie_word_embeddings=False)
    model.lm_head.weight.requires_grad_(trainable)
    before = model.lm_head.weight.detach().clone()
    unlearn(model, objective=Spy)
    (objective,) = objectives
    ref_weight = objective.ref_head.weight
    shared = ref_weight.data_ptr() == model.lm_head.weight.data_ptr()
    assert shared == (not trainable)
    assert torch.equal(ref_weight.cpu(), before)
    assert torch.equal(model.lm_head.weight.cpu(), before) == (not trainable)
    # A mean row that is kept is one of a head that does not change.
    assert (objective.weight_mean is None) == trainable


@pytest.mark.parametrize("trainable", [True, False])
def test_no_second_model_exists(trainable: bool) -> None:
    """With ref_model=None the reference's answers and, if it is trained, its head are all that is kept."""
    accelerator = Accelerator()
    model = tiny_llama().to(accelerator.device)  # tied: the head is the embedding
    model.lm_head.weight.requires_grad_(trainable)
    items = forget_items(load_forget(forget_rows(), None, max_length=1024).examples, 2, None)
    before = live_bytes()
    cache, head = precompute_reference(
        ModelRoot(model),
        items,
        AnchorPrompts([], set(), 0),
        UnlearnConfig(local_loss="topk_mse", top_k=4),
        accelerator,
        own=True,
    )
    held = live_bytes() - before
    answers = sum(t.numel() * 4 for parts in cache.outputs for t in parts.values())
    assert held == answers + (head.weight.numel() * 4 if trainable else 0)


# --- Divergence ---
def with_nan(model: LlamaForCausalLM) -> None:
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = math.nan


def with_infinite_gradient(model: LlamaForCausalLM) -> None:
    """The losses are finite."""
    model.lm_head.weight.register_hook(lambda gradient: gradient * math.inf)


@pytest.mark.parametrize(("damage", "figure"), [(with_nan, "loss"), (with_infinite_gradient, "grad_norm")])
def test_divergence_at_the_first_step(damage: Callable[..., None], figure: str) -> None:
    model = tiny_llama()
    damage(model)
    before = weights(model)
    with pytest.raises(palu.DivergenceError, match=f"^step 1: {figure} = (nan|inf)") as caught:
        unlearn(model)
    assert caught.value.step == 1
    assert caught.value.history == []
    assert same_weights(model, before)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.training
    assert model.config._attn_implementation == "sdpa"


def test_divergence_later_keeps_the_last_good_step(monkeypatch: pytest.MonkeyPatch) -> None:
    good = unlearn(tiny_llama(), epochs=2, batch_size=8)  # two steps
    forward = PaluMethod.batch_losses
    calls = 0

    def diverging(self: Any, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        losses = forward(self, *args)
        if calls < 3:
            return losses
        return losses._replace(total=losses.total * math.inf, terms=losses.terms * math.nan)

    monkeypatch.setattr(PaluMethod, "batch_losses", diverging)
    model = tiny_llama()
    with pytest.raises(palu.DivergenceError, match=r"^step 3: .*weights of step 2") as caught:
        unlearn(model, epochs=9, batch_size=8)
    assert caught.value.step == 3
    assert [r["loss"] for r in caught.value.history] == [r["loss"] for r in good.history]
    assert same_weights(model, weights(good.model))
