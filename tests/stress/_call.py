"""A call of an op with random arguments: what it must return, and what it must refuse."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Arguments = dict[str, Any]


@dataclass
class Bad:
    """One bad argument, and what it must raise."""

    what: str
    change: Callable[[Arguments], Any]  # in place
    errors: tuple[type[Exception], ...]


@dataclass
class Call:
    """One op with good arguments."""

    op: str
    run: Callable[[Arguments], list[Tensor]]  # the results; then the written arguments follow in the comparison
    truth: Callable[[Arguments], list[Tensor]]  # of the results and the written arguments
    arguments: Arguments
    written: list[str] = field(default_factory=list)
    # Allowed besides the rounding of each value to its dtype: in every result, or in each of them.
    error: float | list[float] = 0.0
    # Puts numbers where the op must not look.
    read: Callable[[Arguments], Arguments] = dict
    bad: list[Bad] = field(default_factory=list)

    def tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.arguments.items() if isinstance(value, Tensor)}

    def __str__(self) -> str:
        return f"{self.op}({', '.join(f'{name}={describe(value)}' for name, value in self.arguments.items())})"


def describe(value: Any) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    where = f", {value.device.type}" if value.device.type != "cpu" else ""
    strides = f"strides {list(value.stride())}" if value.layout == torch.strided else str(value.layout)
    return f"<{str(value.dtype).removeprefix('torch.')} {list(value.shape)}, {strides}{where}>"


def loss_and_gradients(
    function: Callable[..., Tensor], a: Arguments, wanted: list[str], create_graph: bool = False
) -> list[Tensor]:
    leaves = {name: a[name].detach().requires_grad_(a[name].is_floating_point()) for name in wanted}
    loss = function(
        **{name: leaves.get(name, value) for name, value in a.items() if name not in ("grad", "create_graph")}
    )
    if not wanted:
        return [loss]
    gradients = torch.autograd.grad(loss, list(leaves.values()), a["grad"], create_graph=create_graph)
    if create_graph:
        torch.autograd.grad(sum(gradient.sum() for gradient in gradients), list(leaves.values()))  # type: ignore[arg-type]
    return [loss.detach(), *gradients]


def for_twin(a: Arguments) -> Arguments:
    """The arguments in float64, without those that say how to compute it."""
    given = {name: value for name, value in a.items() if name not in ("impl", "chunk_bytes")}
    return {n: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in given.items()}
