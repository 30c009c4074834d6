"""Logits in chunks of rows, and the gradients that come of them: what `loss_ops.py` and `topk_ops.py` are made of.

An op forms the logits Z = H W^T + b [r, V] of a chunk of rows, takes from them what it needs and drops them: no logits
outlive their chunk. With G the gradient for Z: dH = G W, dW += G^T H, db += sum_r G_r. With a cap c the op gets
c tanh(Z / c), and G is multiplied by 1 - tanh^2(Z / c) before the products.

The ops are Python that torch.compile sees as one node each. Their arguments were checked by `arguments.py`, but for the
values of an index.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from palu.eager import acc_dtype, softcap_
from palu.ops.fused import GradientSum


class Gradients:
    """Those of hidden, weight and bias that are wanted, filled chunk by chunk; the others are empty tensors."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted: Sequence[bool], several: bool):
        self.weight = weight
        self.of_hidden = hidden.new_zeros(hidden.shape if wanted[0] else 0)  # zero for rows that are in no chunk
        self.of_weight = GradientSum(weight, several) if wanted[1] else None
        self.of_bias = GradientSum(bias, several) if bias is not None and wanted[2] else None
        self.wanted = wanted

    def add(self, of_logits: Tensor, hidden: Tensor, rows: Tensor) -> None:
        """Add what the gradient for a chunk's logits [r, V] gives; `hidden` [r, d] are its rows' hidden states."""
        if self.wanted[0]:
            self.of_hidden.index_copy_(0, rows, of_logits @ self.weight)
        if self.of_weight is not None:
            self.of_weight.add_product(of_logits.t(), hidden)
        if self.of_bias is not None:
            self.of_bias.buffer().add_(of_logits.sum(0))

    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        dtype = self.weight.dtype
        sums = [self.weight.new_empty(0) if s is None else s.result(dtype) for s in (self.of_weight, self.of_bias)]
        return self.of_hidden, sums[0], sums[1]


def split_rows(rows: Tensor, weight: Tensor, chunk_bytes: int, copies: int, capped: bool) -> tuple[Tensor, ...]:
    """Split rows so that the logits of a chunk, so many copies of them, take `chunk_bytes` at most, or are one row."""
    budget = chunk_bytes // max(weight.shape[0] * weight.element_size(), 1)
    if capped and weight.dtype != acc_dtype(weight.dtype):
        budget -= -(-budget // 8)  # for softcap_'s float32
    return rows.split(max(budget // copies, 1)) if len(rows) else ()


def chunk_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, *, slope: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Compute the logits [r, V] of a chunk, and the slope of the cap if there is one and it is asked for."""
    logits = F.linear(hidden, weight, bias)
    return logits, softcap_(logits, softcap, slope=slope) if softcap is not None else None


def define(name: str, arguments: str, results: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Define the op palu::name. Nothing in its kernel is recorded, and the caller's autocast has no say in it."""

    def run(*args: Any) -> Any:
        with torch.no_grad(), torch.autocast(args[0].device.type, enabled=False):
            return kernel(*args)

    op = torch.library.custom_op(f"palu::{name}", run, mutates_args=(), schema=f"({arguments}) -> {results}")
    op.register_fake(fake)
    return op


HEAD = "Tensor hidden, Tensor weight, Tensor? bias"
GRADIENTS = "Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias"


def fake_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    of_bias = bias if bias is not None and wanted[2] else None
    return (
        hidden.new_empty(hidden.shape if wanted[0] else 0),
        weight.new_empty(weight.shape if wanted[1] else 0),
        weight.new_empty(0 if of_bias is None else of_bias.shape),
    )
