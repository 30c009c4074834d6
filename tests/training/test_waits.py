"""How often a step waits for the accelerator: once. Counted on a CPU, by what would wait on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from helpers.runs import unlearn
from helpers.tiny import tiny_llama
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from palu import losses
from palu.training import loop

# What copies numbers to the host, or needs one of them to go on.
READS = {"item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "nonzero", "equal"}
OPS = {"aten._local_scalar_dense", "aten.nonzero", "aten.equal", "aten.masked_select", "aten.unique_dim"}


@contextmanager
def waits() -> Iterator[list[str]]:
    """List what in the block would wait for a GPU: functions of tensors, and ops that torch calls itself."""
    found: list[str] = []
    inside = False

    class Functions(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal inside
            if (name := getattr(func, "__name__", "")) not in READS:
                return func(*args, **(kwargs or {}))
            found.append(name)
            inside = True  # what it calls is a part of it
            with torch._C.DisableTorchFunction():
                result = func(*args, **(kwargs or {}))
            inside = False
            return result

    class Ops(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            masked = str(func) == "aten.index.Tensor" and any(i is not None and i.dtype == torch.bool for i in args[1])
            if not inside and (masked or str(func).rpartition(".")[0] in OPS):
                found.append(str(func))
            return func(*args, **(kwargs or {}))

    with Functions(), Ops():
        yield found


def test_what_is_counted() -> None:
    tensor = torch.ones(3)
    calls: list[Callable[[], Any]] = [
        tensor.sum().item,
        tensor.tolist,
        tensor.numpy,
        lambda: bool(tensor.any()),
        lambda: float(tensor[0]),
        lambda: tensor[tensor > 0],
        tensor.nonzero,
        lambda: torch.equal(tensor, tensor),
    ]
    for call in calls:
        with waits() as found:
            call()
        assert found, call
    with waits() as found:
        torch.stack([tensor * 2, tensor + 1]).sum(0).clamp(max=1)
    assert not found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_waits_once(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """For its figures; the first one for the gradient's norm, too, from which the rate follows."""
    monkeypatch.setattr(losses, "_scale_", lambda gradient, factor: gradient.mul_(factor))  # as it is on a GPU
    counted: list[list[str]] = []
    step = loop.train_step

    def watched(*given: Any) -> dict[str, float]:
        with waits() as found:
            record = step(*given)
        counted.append([name for name in found if name != "__int__"])  # of the steps taken, which is on the host
        return record

    monkeypatch.setattr(loop, "train_step", watched)
    unlearn(tiny_llama(dtype=dtype), learning_rate=None, epochs=2, gradient_accumulation_steps=2)
    assert len(counted) > 1
    assert counted[0] == ["__float__", "tolist"]
    assert all(found == ["tolist"] for found in counted[1:]), counted
