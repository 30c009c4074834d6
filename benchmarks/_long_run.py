"""Give the gradients of one long run to several optimizers, and compare them with float32's AdamW."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from _timing import markdown_table
from _workload import make_model
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

import palu
from palu.config import UnlearnConfig
from palu.training.optimizer import BETAS, EPS, make_optimizer


def make_followers(weights: Sequence[Tensor], rate: float) -> dict[str, torch.optim.Optimizer]:
    """Make the optimizers to compare, each with weights of its own; the first is float32's."""

    def copies(dtype: torch.dtype = torch.bfloat16) -> list[nn.Parameter]:
        return [nn.Parameter(weight.detach().clone().to(dtype)) for weight in weights]

    def ours(name: str) -> torch.optim.Optimizer:
        return make_optimizer(copies(), UnlearnConfig(learning_rate=rate, optimizer=name), Accelerator())

    return {
        "float32": torch.optim.AdamW(copies(torch.float32), rate, BETAS, EPS, weight_decay=0.0),
        "`adamw`": ours("adamw"),
        "`adamw_8bit`": ours("adamw_8bit"),
    }


def whole_weights(optimizer: torch.optim.Optimizer) -> Tensor:
    """Return all weights in float64, with the low bits that the optimizer keeps beside their bfloat16 values."""
    parts = []
    for p in optimizer.param_groups[0]["params"]:
        weight = p.detach().float()
        if "low_bits" in (state := optimizer.state[p]):
            weight.view(torch.int32).add_(state["low_bits"].view(torch.int16))
        parts.append(weight.double().flatten())
    return torch.cat(parts)


def second_moments(optimizer: torch.optim.Optimizer) -> Tensor:
    """Return all second moments in float64."""
    moments = [optimizer.state[p]["exp_avg_sq"] for p in optimizer.param_groups[0]["params"]]
    return torch.cat([(m.dequantize() if hasattr(m, "dequantize") else m).double().flatten() for m in moments])


class Follow:
    """Gives every gradient of a run to the followers, and compares them with float32's AdamW at some steps.

    moment: the median over all weights of the second moment, float32's being 1. update: how far the weights went along
    float32's update since the step before (of ``marks``), 1 for as far.
    """

    def __init__(self, weights: Sequence[Tensor], rate: float, marks: Sequence[int]):
        self.followers, self.marks = make_followers(weights, rate), marks
        self.steps, self.rows = 0, list[dict[str, Any]]()
        self.before: dict[str, Tensor] = {}

    def __call__(self, gradients: Sequence[Tensor | None]) -> None:
        for optimizer in self.followers.values():
            for p, gradient in zip(optimizer.param_groups[0]["params"], gradients, strict=True):
                p.grad = None if gradient is None else gradient.to(p.dtype, copy=True)
            optimizer.step()
        self.steps += 1
        if self.steps != 1 and self.steps not in self.marks:
            return
        now = {name: whole_weights(optimizer) for name, optimizer in self.followers.items()}
        exact = second_moments(self.followers["float32"])
        for name, optimizer in self.followers.items() if self.before else ():
            went, goal = now[name] - self.before[name], now["float32"] - self.before["float32"]
            moment = (second_moments(optimizer) / exact)[exact > 0].median()
            update = went @ goal / goal.square().sum()
            self.rows.append({"step": self.steps, "optimizer": name, "moment": float(moment), "update": float(update)})
        self.before = now


def follow_falling_gradients(marks: Sequence[int], mean: float, deviation: float) -> list[dict[str, Any]]:
    """Follow gradients that fall to a hundredth within 2,300 steps, each with noise of half its size.

    The weights have that mean and deviation.
    """
    torch.manual_seed(0)
    follow = Follow([mean + deviation * torch.randn(128, 128)], 1e-5, marks)
    for step in range(marks[-1]):
        follow([(max(0.01, 0.998**step) * (1 + 0.5 * torch.randn(128, 128))).bfloat16()])
    return follow.rows


def follow_a_run(marks: Sequence[int]) -> list[dict[str, Any]]:
    """Follow the gradients of ``palu.unlearn`` on a bfloat16 Llama of 2 layers: 8 rows to forget, 16 to retain."""
    torch.manual_seed(0)
    model: Any = make_model("tiny", torch.device("cpu"), torch.bfloat16)
    follow = Follow(list(model.parameters()), 1e-4, marks)

    def on_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        parameters = optimizer.param_groups[0]["params"]
        if optimizer not in follow.followers.values():
            follow([p.grad for p in parameters])

    rows = [torch.randint(512, (24,)).tolist() for _ in range(24)]
    forget = [{"input_ids": ids, "labels": [-100] * 8 + ids[8:12] + [-200] * 12} for ids in rows[:8]]
    retain = [{"input_ids": ids, "labels": [-100] * 8 + ids[8:]} for ids in rows[8:]]
    handle = register_optimizer_step_pre_hook(on_step)
    try:
        # A loss that never is 0, which would end the run.
        settings: dict[str, Any] = {"local_loss": "topk_mse", "learning_rate": 1e-4, "max_steps": marks[-1]}
        palu.unlearn(model, None, forget, retain, **settings, progress=False)
    finally:
        handle.remove()
    return follow.rows


def followed(rows: Sequence[dict[str, Any]]) -> str:
    """Format what :class:`Follow` found as Markdown."""
    table: dict[str, list[str]] = {}
    for row in rows:
        table.setdefault(row["optimizer"], []).append(f"{row['moment']:.3f}, {row['update']:.3f}")
    steps = dict.fromkeys(row["step"] for row in rows)
    columns = ["optimizer", *(f"moment, update at {step}" for step in steps)]
    return markdown_table(columns, [[name, *found] for name, found in table.items()])
