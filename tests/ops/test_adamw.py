"""adamw_, a step of AdamW on one parameter: against its formula in float64, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from helpers.adamw_cases import NUMBERS, adamw, join, split
from helpers.compare import compare
from helpers.op_calls import memory
from helpers.op_cases import Draw
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from palu import eager, ops
from palu.config import UnlearnConfig
from palu.training.optimizer import BFloat16AdamW, make_optimizer


def arguments(case: Any, device: torch.device) -> dict[str, Any]:
    """The op's arguments, its tensors parts of larger ones."""
    weight, low_bits = split(case.inputs["start"], case.dtype)
    given = {"weight": weight, "low_bits": low_bits, **{n: t for n, t in case.inputs.items() if n != "start"}}

    def placed(t: Any) -> Any:
        if not isinstance(t, Tensor):
            return t
        whole = torch.full((t.numel() + 5,), 7, device=device).to(t.dtype)
        return whole[3 : 3 + t.numel()].view(t.shape).copy_(t)

    return {name: placed(t) for name, t in given.items()}


@pytest.mark.parametrize("module", [ops, eager], ids=["op", "twin"])
def test_a_step_is_that_of_the_formula(device: torch.device, module: Any) -> None:
    for seed in range(60):
        case = adamw(Draw(seed))
        a = arguments(case, device)
        module.adamw_(**a)
        found = {"weight": join(a["weight"].cpu(), None if a["low_bits"] is None else a["low_bits"].cpu())}
        found |= {name: a[name].cpu() for name in ("exp_avg", "exp_avg_sq")}
        for name, (truth, plain, scale) in case.expected().items():
            wrong, _ = compare(found[name], truth, plain, scale)
            assert not wrong, f"{name}: {wrong}; {case.text}"


def test_bad_arguments_are_named_and_nothing_changes(device: torch.device) -> None:
    case = adamw(Draw(0), dtype=torch.bfloat16, size=8, clip=True)
    bad: list[tuple[str, Any, type[Exception]]] = [
        ("weight", torch.zeros(8, dtype=torch.float64, device=device), TypeError),
        ("grad", torch.zeros(7, dtype=torch.bfloat16, device=device), ValueError),
        ("exp_avg", torch.zeros(8, device=device), TypeError),
        ("exp_avg_sq", torch.zeros(16, device=device)[::2], ValueError),
        ("low_bits", None, ValueError),
        ("clip_factor", torch.zeros(2, device=device), ValueError),
        ("step", 0, ValueError),
        ("exp_avg", torch.zeros(8, dtype=torch.bfloat16, device=device, requires_grad=True), RuntimeError),
    ]
    for name, value, error in bad:
        a = arguments(case, device) | {name: value}
        before = {n: memory(t) for n, t in a.items() if isinstance(t, Tensor)}
        with pytest.raises(error, match=name):
            ops.adamw_(**a)
        assert all(torch.equal(memory(a[n]), bytes_) for n, bytes_ in before.items()), name


def test_opcheck(device: torch.device) -> None:
    a = arguments(adamw(Draw(1), dtype=torch.bfloat16, size=16, clip=True), device)
    names = ("weight", "grad", "exp_avg", "exp_avg_sq", "low_bits", "clip_factor", *NUMBERS)
    torch.library.opcheck(torch.ops.palu.adamw_.default, tuple(a[name] for name in names))


class Launches(TorchDispatchMode):
    """Counts the ops within the block, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_the_optimizer_launches_one_kernel_a_parameter(device: torch.device) -> None:
    """On CUDA; there are no other ops but those of the first step, and what a transposed parameter is turned by."""
    parameters = [nn.Parameter((torch.randn(5, 4, device=device) / 10).bfloat16()) for _ in range(3)]
    parameters.append(nn.Parameter((torch.randn(4, 6, device=device) / 10).bfloat16().t()))
    optimizer = make_optimizer(parameters, UnlearnConfig(learning_rate=1e-2), Accelerator())
    assert isinstance(optimizer, BFloat16AdamW)
    for _ in range(2):
        before = [p.detach().clone() for p in parameters]
        for p in parameters:
            p.grad = torch.ones_like(p)
        with Launches() as found:
            optimizer.step()
        assert all((p < old).all() for p, old in zip(parameters, before, strict=True))
    assert [name for name in found.names if "palu" in name] == ["palu.adamw_.default"] * 4
    others = {name for name in found.names if not name.startswith(("palu", "profiler"))}
    assert others <= {"aten.permute.default", "aten.add_.Tensor", "aten._local_scalar_dense.default"}  # of step's count


def test_a_clip_factor_does_what_clipped_gradients_do(device: torch.device) -> None:
    ends = []
    for factor in (None, 0.25):
        parameter = nn.Parameter(torch.ones(64, device=device).bfloat16())
        optimizer = BFloat16AdamW([parameter], 1e-2, 0.0, 0)
        if factor is not None:
            optimizer.clip_factor = torch.tensor(factor, device=device)
        for step in range(3):
            gradient = torch.sin(torch.arange(64.0, device=device) + step).bfloat16()
            parameter.grad = gradient if factor is not None else gradient * 0.25
            optimizer.step()
        ends.append(parameter.detach())
    assert torch.equal(*ends)
