"""Weights in bfloat16 train as those in float32 do, but for the rounding of the result."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from helpers import runs, scenarios
from helpers.tiny import forget_rows, overfit, retain_rows, same_weights, tiny_llama, weights
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import LlamaForCausalLM, TrainingArguments

import palu
from palu.config import UnlearnConfig
from palu.models.checks import check_models
from palu.training import checkpoint
from palu.training.loop import UnlearnResult
from palu.training.optimizer import load_state, make_optimizer

RATE = 1e-5  # a step that plain AdamW on bfloat16 mostly rounds away


def bf16_llama() -> LlamaForCausalLM:
    return tiny_llama(dtype=torch.bfloat16, initializer_range=0.05)


# With a floor a run would end when all is below it.
unlearn = functools.partial(
    runs.unlearn, learning_rate=RATE, epochs=10, local_loss="unlikelihood", probability_floor=0.0
)


def change(model: LlamaForCausalLM, start: dict[str, Tensor]) -> Tensor:
    after = weights(model)
    return torch.cat([(after[name].float() - start[name].float()).flatten() for name in start])


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


def test_bfloat16_weights_train_as_float32_ones_do() -> None:
    """Twenty steps: the update of float32, but for rounding, and the same losses; plain AdamW's is another."""
    start = weights(bf16_llama())
    model = bf16_llama().float()
    exact = unlearn(model)
    full = change(model, start)
    low = bf16_llama()
    result = unlearn(low)
    assert low.dtype == torch.bfloat16 and len(result.history) == 20
    ours = change(low, start)
    # Each weight has moved by nothing or by whole distances of some 1e-4: right on average.
    assert float(ours @ full / full.square().sum()) == pytest.approx(1, abs=0.1)
    assert cosine(ours, full) > 0.5
    for record, expected in zip(result.history, exact.history, strict=True):
        assert record["loss"] == pytest.approx(expected["loss"], rel=0.02)

    plain = bf16_llama()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "palu.training.loop.make_optimizer", lambda p, *_: torch.optim.AdamW(list(p), RATE, weight_decay=0)
        )
        unlearn(plain)
    lost = change(plain, start)
    assert float(lost @ full / full.square().sum()) < 0.7, "the test would pass with plain AdamW"


def test_the_first_steps_are_not_lost() -> None:
    """Loaded weights lie on bfloat16 values: without a random start none moves until a step is half the distance."""
    start = weights(bf16_llama())
    exact = bf16_llama().float()
    unlearn(exact, epochs=1)  # two steps
    full = change(exact, start)

    def moved(seed: int) -> Tensor:
        model = bf16_llama()
        unlearn(model, epochs=1, seed=seed)
        return change(model, start)

    once, again = moved(0), moved(0)
    assert torch.equal(once, again), "the seed decides"
    # On average the weights move as far as in float32; each of them by nothing or by a whole distance.
    assert float(once @ full / full.square().sum()) == pytest.approx(1, abs=0.25)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("palu.training.optimizer._random_low_bits", lambda p, _: torch.zeros_like(p))
        assert float(moved(0) @ full / full.square().sum()) < 0.5, "the test would pass without the random start"


def test_long_runs_train_as_float32_does() -> None:
    """3,000 steps of gradients that fall to a hundredth: second moment and weights stay those of torch's AdamW.

    In bfloat16 a second moment does not decay by a thousandth, and neither small steps nor weight decay are kept.
    """
    torch.manual_seed(0)
    start = (1 + torch.rand(4096)).bfloat16()
    low, full = nn.Parameter(start.clone()), nn.Parameter(start.float())
    optimizer = make_optimizer([low], UnlearnConfig(learning_rate=RATE, weight_decay=0.1), Accelerator())
    exact = torch.optim.AdamW([full], RATE, weight_decay=0.1)
    at: list[Tensor] = []  # [float32, bfloat16] after 1,000 steps and after 3,000
    for step in range(3000):
        low.grad = ((1 + 0.5 * torch.randn(4096)) * max(0.01, 0.998**step)).bfloat16()
        full.grad = low.grad.float()
        optimizer.step()
        exact.step()
        if step in (999, 2999):
            at.append(torch.stack([full.detach(), low.detach().float()]))
    moment, expected = optimizer.state[low]["exp_avg_sq"], exact.state[full]["exp_avg_sq"]
    torch.testing.assert_close(moment.float(), expected, rtol=1e-4, atol=0)
    of_float32, of_bfloat16 = (at[1] - at[0]).mean(1)
    assert of_bfloat16 == pytest.approx(float(of_float32), rel=0.1)


def test_weights_whose_gradient_is_zero_stay_as_they_are() -> None:
    """The random start is less than what rounds to the next value: at 0, at powers of two and of tiny numbers, too."""
    numbers = torch.cat([torch.tensor([0.0, -0.0, 1.0, -2.0, 1e-38, -1e-40]), torch.randn(4090)])
    parameter = nn.Parameter(numbers.bfloat16())
    before = {"weight": parameter.detach().clone()}
    optimizer = make_optimizer([parameter], UnlearnConfig(), Accelerator())
    for _ in range(3):
        parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    assert (optimizer.state[parameter]["low_bits"].view(torch.int16) != 0).float().mean() > 0.9
    assert same_weights(nn.ParameterDict({"weight": parameter}), before)


def test_state_of_weights_in_two_dtypes_is_restored() -> None:
    """Each in its own dtype, and from a file laid out as the weight, which may be transposed.

    A float32 weight beside a bfloat16 one has no further bits.
    """
    config, accelerator = UnlearnConfig(learning_rate=1e-2), Accelerator()

    def start() -> list[nn.Parameter]:
        torch.manual_seed(0)
        return [nn.Parameter(torch.randn(3, 5).to(dtype).T) for dtype in (torch.bfloat16, torch.float32)]

    def step(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, number: int) -> None:
        for parameter in parameters:
            parameter.grad = torch.sin(torch.arange(15.0).view(3, 5) + number).to(parameter.dtype).T
        optimizer.step()

    whole = start()
    optimizer = make_optimizer(whole, config, accelerator)
    for number in range(3):
        step(whole, optimizer, number)
    again = [nn.Parameter(p.detach().clone()) for p in whole]
    restored = make_optimizer(again, config, accelerator)
    states = [{name: value.contiguous().clone() for name, value in optimizer.state[p].items()} for p in whole]
    moments = {"step": torch.float32, "exp_avg": torch.bfloat16, "exp_avg_sq": torch.float32}
    assert [{name: value.dtype for name, value in state.items()} for state in states] == [
        moments | {"low_bits": torch.bfloat16},
        moments | {"exp_avg": torch.float32},
    ]
    load_state(restored, states, 1e-2)
    for number in range(3, 6):
        step(whole, optimizer, number)
        step(again, restored, number)
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))


def test_float16_weights_are_refused_where_the_kernels_know_them_too() -> None:
    """Also frozen ones, through which an adapter's gradient goes."""
    trained, frozen = tiny_llama(dtype=torch.float16), tiny_llama(dtype=torch.float16).requires_grad_(False)
    frozen.model.norm.float().requires_grad_(True)
    for model in (trained, frozen):
        with pytest.raises(ValueError, match=r"^the model is in float16, in which .* underflow, .*; load it"):
            check_models(model, None, None, torch.device("cuda"), "no")


def test_trainer_refuses_bfloat16_weights(tmp_path: Path) -> None:
    args = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    with pytest.raises(ValueError, match=r"trainable weights are in bfloat16.*dtype=torch\.float32 and set bf16=True"):
        palu.PaluTrainer(bf16_llama(), args, forget=forget_rows(), retain=retain_rows())
    model = bf16_llama()
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    palu.PaluTrainer(model, args, forget=forget_rows(), retain=retain_rows(), optimizers=(optimizer, None))


# --- The rate ---
def first_step(model: LlamaForCausalLM, **given: Any) -> tuple[UnlearnResult, float]:
    """Unlearn; returns the result, and the 1-norm of the first gradient before clipping."""
    gradients: list[float] = []

    def keep(optimizer: Any, *_: Any) -> None:
        clipped = float(getattr(optimizer, "clip_factor", 1.0))  # by which ours multiplies the gradients itself
        norm = sum(float(p.grad.double().abs().sum()) for p in optimizer.param_groups[0]["params"])
        gradients.append(clipped * norm)

    handle = register_optimizer_step_pre_hook(keep)
    try:
        result = unlearn(model, learning_rate=None, **given)
    finally:
        handle.remove()
    return result, gradients[0] * max(1, result.history[0]["grad_norm"] / result.summary["config"]["max_grad_norm"])


@pytest.mark.parametrize(
    ("dtype", "settings"),
    [
        (torch.float64, {}),
        (torch.float64, {"gamma": 5.0, "lambda_retain": 2.0}),
        (torch.float64, {"batch_size": 2, "gradient_accumulation_steps": 2, "weight_decay": 0.1}),
        (torch.float64, {"max_grad_norm": 1e-3}),
        (torch.float64, {"gamma": 0.0}),
        (torch.bfloat16, {}),
        (torch.bfloat16, {"max_grad_norm": 1e-3}),
    ],
    ids=str,
)
def test_the_rate_follows_from_the_first_gradient(dtype: torch.dtype, settings: dict[str, Any]) -> None:
    """Two thirds of the forget loss over the gradient's 1-norm before clipping; a rate that is given wins."""
    given = {"lr_scheduler": "linear", "epochs": 3, "batch_size": 8} | settings
    result, norm1 = first_step(tiny_llama(dtype=dtype), **given)
    rate, first = result.summary["config"]["learning_rate"], result.history[0]
    assert first["local"] < 1.5 < first["retain"], "what the retain set adds would be seen"
    loss = settings.get("gamma", 1.0) * first["local"] or first["loss"]
    assert rate == pytest.approx(2 / 3 * loss / norm1, rel=1e-3 if dtype == torch.float64 else 0.02)
    steps = len(result.history)
    assert [r["learning_rate"] for r in result.history] == pytest.approx(
        [rate * (steps - i) / steps for i in range(steps)]
    )
    again = unlearn(tiny_llama(dtype=dtype), **given | {"learning_rate": rate})
    assert same_weights(again.model, weights(result.model))


@pytest.mark.parametrize(
    ("settings", "in_nats"),
    [
        ({}, True),
        ({"gamma": 7.0, "lambda_kl": 7.0, "lambda_retain": 7.0}, True),
        ({"local_loss": "topk_mse", "probability_floor": UnlearnConfig().method.probability_floor}, False),
    ],
)
def test_the_rate_for_what_is_known_by_heart(settings: dict[str, Any], in_nats: bool) -> None:
    """A nat of the forget loss, where it is in nats."""
    model = tiny_llama(dtype=torch.float64)
    overfit(model, forget_rows() + retain_rows())
    result, norm1 = first_step(model, max_steps=1, **settings)
    first = result.history[0]
    assert first["local"] > 2
    fall = settings.get("gamma", 1.0) * (1 if in_nats else 2 / 3 * first["local"])
    assert result.summary["config"]["learning_rate"] == pytest.approx(fall / norm1, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_step_is_taken_before_there_is_something_to_forget(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rate comes from the first step with a forget loss, which is AdamW's first, also after a resume."""
    start = tiny_llama(dtype=dtype)
    overfit(start, forget_rows()[2:4] + retain_rows())
    settings = {"learning_rate": None, "batch_size": 1, "probability_floor": 0.3, "max_steps": 6}

    def run(**more: Any) -> UnlearnResult:
        return unlearn(copy.deepcopy(start), **settings | more)

    expected = run()
    rates = [record["learning_rate"] for record in expected.history]
    first = next(i for i, record in enumerate(expected.history) if record["local"] > 0)
    assert 2 <= first < 5, "the test needs steps before, and some after"
    assert all(record["retain"] > 0 for record in expected.history)
    assert rates == [0] * first + [rates[-1]] * (6 - first) and rates[-1] > 0
    before = weights(start)
    assert same_weights(run(max_steps=first).model, before)
    if dtype == torch.float32:
        assert change(run(max_steps=first + 1).model, before).abs().max() == pytest.approx(rates[-1], rel=1e-3)

    monkeypatch.setattr(checkpoint, "KEPT", 99)
    folder = {"checkpoint_dir": str(tmp_path), "checkpoint_steps": 1}
    run(**folder)
    for last in (first + 1, first - 1):
        for later in range(last + 1, 7):
            (tmp_path / scenarios.step(later)).unlink(missing_ok=True)
        scenarios.assert_same(run(**folder, resume=True), expected)
