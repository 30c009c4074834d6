"""Compare every op, as it runs on a device of this machine, with its plain-torch twin: seconds, and no pytest."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from palu import eager, ops
from palu.settings import KL_DIRECTIONS, TARGETS

ROWS, VOCAB, HIDDEN, K = 33, 1009, 64, 20
# Largest difference, as a share of the largest value.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-5}


@dataclass(frozen=True)
class Check:
    """The outcome of one op on one device in one dtype."""

    op: str
    device: str
    dtype: str
    error: float  # largest difference to the twin in float64, as a share of its largest value
    passed: bool
    problem: str  # the exception, where the op raised one


def check_ops(device: torch.device) -> Iterator[Check]:
    """Run every op, forward and backward, on seeded random inputs beside its twin in float64 on the CPU."""
    for dtype, tolerance in TOLERANCES.items():
        if dtype == torch.float64 and not _has_float64(device):
            continue
        for name, inputs in _calls().items():
            if name == "adamw_" and dtype == torch.float64:  # which no weight is trained in
                continue
            error, problem = float("nan"), ""
            try:
                ours = _results(ops, name, inputs, device, dtype)
                twins = _results(eager, name, inputs, torch.device("cpu"), torch.float64)
                error = max(_difference(mine.cpu(), twin) for mine, twin in zip(ours, twins, strict=True))
            except Exception as raised:  # whatever it is, it is the finding
                text = str(raised).strip().partition("\n")[0]
                problem = f"{type(raised).__name__}: {text}"
            yield Check(name, str(device), str(dtype).removeprefix("torch."), error, error <= tolerance, problem)


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


def _calls() -> dict[str, list[Any]]:
    """Draw the arguments of each check, floats in float64; its name begins with the op's."""
    generator = torch.Generator().manual_seed(0)

    def values(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).double()

    def index(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator)

    labels, kept, logits, row_weight = index(6, 8, 50), index(VOCAB, ROWS, K), values(ROWS, VOCAB), values(ROWS)
    head = [values(ROWS, HIDDEN), values(VOCAB, HIDDEN), kept]
    bias = values(VOCAB)
    calls: dict[str, list[Any]] = {"prefix_mask": [torch.where(labels < 2, -200, labels), 3, 5]}
    for target in (*TARGETS, 0.5):
        calls[f"topk_mse, {target}"] = [logits, kept, target]
        calls[f"linear_topk_mse, {target}"] = [*head, target, bias]
    calls["topk_unlikelihood"] = [logits, kept, 0.5 / K]
    calls["linear_topk_unlikelihood"] = [*head, 0.5 / K, bias]
    calls["cross_entropy_"] = [logits, index(VOCAB, ROWS), row_weight]
    for name in KL_DIRECTIONS:
        calls[f"kl_div_, {name}"] = [logits, values(ROWS, VOCAB), row_weight, name == "reverse"]
    second_moment = values(ROWS).square()
    calls["adamw_"] = [*(values(ROWS) for _ in range(3)), second_moment, None, None, 3, 1e-2, 0.1, 0.9, 0.999, 1e-8]
    return calls


def _results(module: Any, name: str, given: list[Any], device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Run an op of a module (ours, or the twins); return its result and its gradients."""
    op = name.partition(",")[0]
    given = [value.to(device, copy=True) if isinstance(value, Tensor) else value for value in given]
    given = [v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for v in given]
    if op.endswith("_"):  # it writes the gradient into the logits, or the weight
        result = getattr(module, op)(*given)
        return given[:1] if result is None else [result, given[0]]
    leaves = [v.requires_grad_() for v in given if isinstance(v, Tensor) and v.is_floating_point()]
    result = getattr(module, op)(*given)
    upstream = torch.linspace(-1, 1, len(result), device=device, dtype=dtype)
    return [result.detach(), *(torch.autograd.grad(result, leaves, upstream) if leaves else ())]
