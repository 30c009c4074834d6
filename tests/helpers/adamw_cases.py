"""Random steps of AdamW on one parameter, and what its formula makes of them."""

from __future__ import annotations

from functools import partial

import torch
from helpers.op_cases import Draw, Inputs, OpCase, Outputs
from torch import Tensor

NUMBERS = ("step", "rate", "weight_decay", "beta1", "beta2", "eps")


def adamw(
    draw: Draw,
    *,
    dtype: torch.dtype | None = None,
    size: int | None = None,
    clip: bool | None = None,
    decay: float | None = None,
) -> OpCase:
    """A parameter [size] of this dtype, float32 or bfloat16, its float32 value as `start`, and a step's numbers."""
    dtype = dtype or draw.one(torch.float32, torch.bfloat16)
    size = int(draw.one(0, 1, 7, 8, 255, 2048, 2049)) if size is None else size
    clip = draw.chance(0.5) if clip is None else clip
    inputs: Inputs = {
        "start": torch.randn(size) * draw.one(1, 0.02),
        "grad": (torch.randn(size) * draw.one(1, 1e-3)).to(dtype),
        "exp_avg": (torch.randn(size) * draw.one(0, 1e-3)).to(dtype),
        "exp_avg_sq": torch.rand(size) * draw.one(0, 1e-4),
        "clip_factor": torch.rand(()) if clip else None,
    }
    numbers = (
        draw.one(1, 2, 1000),
        draw.one(1e-5, 1e-2),
        draw.one(0.0, 0.1) if decay is None else decay,
        0.9,
        0.999,
        1e-8,
    )
    inputs |= dict(zip(NUMBERS, numbers, strict=True))
    return OpCase("adamw_", inputs, partial(_adamw, dtype), dtype, _adamw_scales)


def _adamw(dtype: torch.dtype, a: Inputs) -> Outputs:
    """One step by its formula, with the first moment rounded to the parameter's dtype."""
    acc = a["start"].dtype
    grad = a["grad"].to(acc) * (1 if a["clip_factor"] is None else a["clip_factor"])
    exp_avg = (a["exp_avg"].to(acc) + (1 - a["beta1"]) * (grad - a["exp_avg"].to(acc))).to(dtype)
    exp_avg_sq = a["exp_avg_sq"] + (1 - a["beta2"]) * (grad.square() - a["exp_avg_sq"])
    first, second = (1 - a[beta] ** a["step"] for beta in ("beta1", "beta2"))
    step = a["rate"] / first * exp_avg.to(acc) / ((exp_avg_sq / second).sqrt() + a["eps"])
    return {
        "weight": a["start"] * (1 - a["rate"] * a["weight_decay"]) - step,
        "exp_avg": exp_avg,
        "exp_avg_sq": exp_avg_sq,
    }


def _adamw_scales(a: Inputs, truth: Outputs, dtype: torch.dtype) -> Outputs:
    # The first moment may be rounded to its other neighbour, which moves the step by as much: that is 16 units.
    moved = (truth["weight"] - a["start"]).abs() * torch.finfo(dtype).eps / torch.finfo(torch.float32).eps
    terms = a["exp_avg"].abs() + a["grad"].abs()
    return {"weight": a["start"].abs() + moved / 16, "exp_avg": terms, "exp_avg_sq": a["exp_avg_sq"] + terms.square()}


def split(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Split float32 weights into bfloat16 ones, rounded, and their lower bits; as float32 they stay whole."""
    if dtype == torch.float32:
        return weight, None
    bits = weight.view(torch.int32)
    upper = ((bits + 2**15) >> 16).to(torch.int16).view(torch.bfloat16)
    return upper, bits.to(torch.int16).view(torch.bfloat16)


def join(weight: Tensor, low_bits: Tensor | None) -> Tensor:
    """Return the float32 weights of which these are the parts."""
    if low_bits is None:
        return weight
    return ((weight.view(torch.int16).int() << 16) + low_bits.view(torch.int16).int()).view(torch.float32)
