"""Compare every op, as it runs on a device of this machine, with its plain-torch twin: seconds, and no pytest."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from palu import eager, ops
from palu.eager import acc_dtype
from palu.settings import KL_DIRECTIONS, TARGETS

ROWS, VOCAB, HIDDEN, K = 33, 1009, 64, 20
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Check:
    """The outcome of one op on one device in one dtype."""

    op: str
    device: str
    dtype: str
    error: float  # largest difference to the twin in float64, as a share of its largest value
    allowed: float
    problem: str  # the exception, where the op raised one

    @property
    def passed(self) -> bool:
        """Whether the op ran and its error is allowed."""
        return self.error <= self.allowed


def check_ops(device: torch.device) -> Iterator[Check]:
    """Run every op, forward and backward, on seeded random inputs beside its twin in float64 on the CPU.

    Allowed is four times what the twin loses on the CPU in the same dtype; where it is right by luck, half an ulp of
    the result and 64 ulps of the dtype of its sums, of which the longest have a thousand terms.
    """
    for dtype in DTYPES:
        if not _can_compute(device, dtype):
            continue
        for name, inputs in _calls(dtype).items():
            error, allowed, problem = float("nan"), float("nan"), ""
            try:
                found = _results(ops, name, inputs, device)
                twins = _results(eager, name, inputs, CPU), _results(eager, name, _in_float64(name, inputs), CPU)
                errors = [
                    (_difference(ours.cpu(), truth), _allowed(plain, truth))
                    for ours, plain, truth in zip(found, *twins, strict=True)
                ]
                error, allowed = max(errors, key=lambda pair: pair[0] / pair[1] if pair[1] else pair[0])
            except Exception as raised:  # whatever it is, it is the finding
                text = str(raised).strip().partition("\n")[0]
                problem = f"{type(raised).__name__}: {text}"
            yield Check(name, str(device), str(inputs[0].dtype).removeprefix("torch."), error, allowed, problem)


def _can_compute(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a device can compute in a dtype: MPS cannot in float64, nor can some of XPU's."""
    try:
        return bool(torch.ones(1, dtype=dtype, device=device).add(1).cpu() == 2)
    except (RuntimeError, TypeError):
        return False


def _difference(ours: Tensor, twin: Tensor) -> float:
    if ours.dtype == torch.bool:
        return float((ours != twin).any())
    difference = (ours.double() - twin).abs().max() / twin.abs().max()
    return float(difference.nan_to_num(nan=torch.inf))


def _allowed(plain: Tensor, truth: Tensor) -> float:
    if plain.dtype == torch.bool:
        return 0.0
    roundings = torch.finfo(plain.dtype).eps / 2 + 64 * torch.finfo(acc_dtype(plain.dtype)).eps
    return max(roundings, 4 * _difference(plain, truth))


def _calls(dtype: torch.dtype) -> dict[str, list[Any]]:
    """Draw the arguments of each check; its name begins with the op's."""
    generator = torch.Generator().manual_seed(0)

    def values(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    def index(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator)

    labels, kept, logits = index(6, 8, 50), index(VOCAB, ROWS, K), values(ROWS, VOCAB)
    row_weight = values(ROWS).to(acc_dtype(dtype))
    head = [values(ROWS, HIDDEN), values(VOCAB, HIDDEN) / HIDDEN**0.5, kept]
    bias = values(VOCAB)
    calls: dict[str, list[Any]] = {}
    if dtype == torch.float32:  # it knows no other numbers than labels
        calls["prefix_mask"] = [torch.where(labels < 2, -200, labels), 3, 5]
    for target in (*TARGETS, 0.5):
        calls[f"topk_mse, {target}"] = [logits, kept, target]
        calls[f"linear_topk_mse, {target}"] = [*head, target, bias]
    calls["topk_unlikelihood"] = [logits, kept, 0.5 / K]
    calls["linear_topk_unlikelihood"] = [*head, 0.5 / K, bias]
    calls["cross_entropy_"] = [logits, index(VOCAB, ROWS), row_weight]
    for name in KL_DIRECTIONS:
        calls[f"kl_div_, {name}"] = [logits, values(ROWS, VOCAB), row_weight, name == "reverse"]
    if dtype != torch.float64:  # in which no weight is trained
        second_moment, clip_factor = values(ROWS).float().square(), torch.tensor(0.5)
        low_bits = (index(2**16, ROWS) - 2**15).to(torch.int16).view(dtype) if dtype == torch.bfloat16 else None
        calls["adamw_"] = [*(values(ROWS) for _ in range(3)), second_moment, low_bits, clip_factor]
        calls["adamw_"] += [3, 1e-2, 0.1, 0.9, 0.999, 1e-8]
    return calls


def _in_float64(name: str, given: list[Any]) -> list[Any]:
    if name == "adamw_":
        weight, *moments, low_bits = given[:5]
        given = [_whole(weight, low_bits), *moments, None, *given[5:]]
    return [v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for v in given]


def _whole(weight: Tensor, low_bits: Tensor | None) -> Tensor:
    """Join the halves of a float32 weight, as csrc/adamw.h says."""
    if low_bits is None:
        return weight
    return ((weight.view(torch.int16).int() << 16) + low_bits.view(torch.int16).int()).view(torch.float32)


def _results(module: Any, name: str, given: list[Any], device: torch.device) -> list[Tensor]:
    """Run an op of a module (ours, or the twins); return all that it computes, gradients included."""
    op = name.partition(",")[0]
    given = [value.to(device, copy=True) if isinstance(value, Tensor) else value for value in given]
    if op == "adamw_":
        module.adamw_(*given)
        return [_whole(given[0], given[4]), given[2], given[3]]
    if op.endswith("_"):  # it writes the gradient into the logits
        return [getattr(module, op)(*given), given[0]]
    leaves = [v.requires_grad_() for v in given if isinstance(v, Tensor) and v.is_floating_point()]
    result = getattr(module, op)(*given)
    if not leaves:
        return [result]
    upstream = torch.linspace(-1, 1, len(result), device=device, dtype=result.dtype)
    return [result.detach(), *torch.autograd.grad(result, leaves, upstream)]
