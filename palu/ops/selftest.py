"""Compare every op, as it runs on a device of this machine, with its plain-torch twin: seconds, and no pytest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from palu import eager, ops
from palu.settings import KL_DIRECTIONS, TARGETS

ROWS, VOCAB, HIDDEN, K = 33, 1009, 64, 20
# Largest difference, as a share of the largest value.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-5}

_Results = list[Tensor]


@dataclass(frozen=True)
class Check:
    """The outcome of one op on one device in one dtype."""

    op: str
    device: str
    dtype: str
    error: float  # largest difference to the twin in float64, as a share of its largest value
    passed: bool
    problem: str = ""  # the exception, where the op raised one


def check_ops(device: torch.device) -> Iterator[Check]:
    """Run every op, forward and backward, on seeded random inputs beside its twin in float64 on the CPU.

    A device without float64 runs them in float32 alone.
    """
    for dtype, tolerance in TOLERANCES.items():
        if dtype == torch.float64 and not _has_float64(device):
            continue
        for name, function in _functions().items():
            told = str(dtype).removeprefix("torch.")
            try:
                ours, twins = function(ops, device, dtype), function(eager, torch.device("cpu"), torch.float64)
                error = max(_difference(mine.cpu(), twin) for mine, twin in zip(ours, twins, strict=True))
            except Exception as problem:  # whatever it is, it is the finding
                text = str(problem).strip().partition("\n")[0]
                yield Check(name, str(device), told, float("nan"), False, f"{type(problem).__name__}: {text}")
            else:
                yield Check(name, str(device), told, error, error <= tolerance)


def _has_float64(device: torch.device) -> bool:
    """Whether a device can compute in float64: MPS cannot, nor can some of XPU's."""
    try:
        return bool(torch.ones(1, dtype=torch.float64, device=device).add(1).cpu() == 2)
    except (RuntimeError, TypeError):
        return False


def _difference(ours: Tensor, twin: Tensor) -> float:
    if ours.dtype == torch.bool:
        return float((ours != twin).any())
    difference = (ours.double() - twin).abs().max() / twin.abs().max()
    return float(difference.nan_to_num(nan=torch.inf))


def _functions() -> dict[str, Callable[[Any, torch.device, torch.dtype], _Results]]:
    """Name the checks: each runs one op of a module (ours, or the twins) and returns its results and gradients."""
    functions: dict[str, Callable[[Any, torch.device, torch.dtype], _Results]] = {"prefix_mask": _prefix_mask}
    for target in (*TARGETS, 0.5):
        functions[f"topk_mse, {target}"] = partial(_of_logits, "topk_mse", target)
        functions[f"linear_topk_mse, {target}"] = partial(_linear, "linear_topk_mse", target)
    functions["topk_unlikelihood"] = partial(_of_logits, "topk_unlikelihood", 0.5 / K)
    functions["linear_topk_unlikelihood"] = partial(_linear, "linear_topk_unlikelihood", 0.5 / K)
    functions["cross_entropy_"] = _cross_entropy
    for direction in KL_DIRECTIONS:
        functions[f"kl_div_, {direction}"] = partial(_kl_div, reverse=direction == "reverse")
    return functions


def _random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).float().double()


def _index(seed: int, high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def _prefix_mask(module: Any, device: torch.device, dtype: torch.dtype) -> _Results:
    labels = _index(0, 6, 8, 50)
    labels = torch.where(labels < 2, -200, labels).to(device)
    return [module.prefix_mask(labels, n, eos) for n in (-1, 0, 1, 3) for eos in (None, 5)]


def _of_logits(op: str, setting: Any, module: Any, device: torch.device, dtype: torch.dtype) -> _Results:
    logits = _random(1, ROWS, VOCAB).to(dtype).to(device).requires_grad_()
    loss = getattr(module, op)(logits, _index(2, VOCAB, ROWS, K).to(device), setting)
    return [loss.detach(), *torch.autograd.grad(loss @ _random(3, ROWS).to(loss.dtype).to(device), logits)]


def _linear(op: str, setting: Any, module: Any, device: torch.device, dtype: torch.dtype) -> _Results:
    leaves = [_random(seed, *shape) for seed, shape in ((4, (ROWS, HIDDEN)), (5, (VOCAB, HIDDEN)), (6, (VOCAB,)))]
    hidden, weight, bias = (leaf.to(dtype).to(device).requires_grad_() for leaf in leaves)
    loss = getattr(module, op)(hidden, weight, _index(7, VOCAB, ROWS, K).to(device), setting, bias)
    grads = torch.autograd.grad(loss @ _random(8, ROWS).to(loss.dtype).to(device), (hidden, weight, bias))
    return [loss.detach(), *grads]


def _cross_entropy(module: Any, device: torch.device, dtype: torch.dtype) -> _Results:
    logits = _random(9, ROWS, VOCAB).to(dtype).to(device)
    row_weight = _random(10, ROWS).to(dtype).to(device)
    return [module.cross_entropy_(logits, _index(11, VOCAB, ROWS).to(device), row_weight), logits]


def _kl_div(module: Any, device: torch.device, dtype: torch.dtype, reverse: bool) -> _Results:
    logits, other = (_random(seed, ROWS, VOCAB).to(dtype).to(device) for seed in (12, 13))
    row_weight = _random(14, ROWS).to(dtype).to(device)
    return [module.kl_div_(logits, other, row_weight, reverse), logits]
