"""Losses with forward and backward in one call, for `palu.losses.fused_linear_losses`. No autograd.

A trailing underscore means, as in torch, that the first argument is overwritten: with its gradient.
"""

from typing import TypeAlias

import torch
from torch import Tensor

from palu.ops.functional import has_frozen, needed_mean, split_target

_ops = torch.ops.palu

# Of hidden [R, d], weight [V, d] and bias [V], to be added to; None: not asked for.
Grads: TypeAlias = tuple[Tensor | None, Tensor | None, Tensor | None]


def topk_mse_fwd_bwd_(logits: Tensor, index: Tensor, row_weight: Tensor, target: str | float) -> Tensor:
    """Compute `topk_mse` of each row [R]; `logits` [R, V] become its gradient times `row_weight` [R]."""
    name, constant = split_target(target)
    loss, slope = _ops.topk_mse(logits, index, name, constant)
    _ops.topk_backward(row_weight, slope, index, name == "global_mean", logits)
    return loss


def topk_unlikelihood_fwd_bwd_(logits: Tensor, index: Tensor, row_weight: Tensor, floor: float) -> Tensor:
    """Compute `topk_unlikelihood` of each row [R]; `logits` [R, V] become its gradient times `row_weight` [R]."""
    loss, slope = _ops.topk_unlikelihood(logits, index, floor)
    _ops.topk_backward(row_weight, slope, index, False, logits)
    return loss


def linear_topk_mse_fwd_bwd(
    hidden: Tensor,
    weight: Tensor,
    index: Tensor,
    row_weight: Tensor,
    target: str | float,
    bias: Tensor | None,
    mean: Tensor | None,
    grads: Grads,
) -> Tensor:
    """Compute `linear_topk_mse` of each row [R]; its gradient times `row_weight` [R] is added to `grads`.

    `mean`: [d], `weight_mean(weight)`; None: computed here.
    """
    name, constant = split_target(target)
    mean = needed_mean(weight, mean, name)
    grad_hidden, *grads_of_head = grads
    if grad_hidden is not None and grads_of_head == [None, None] and has_frozen(hidden, name):
        loss, gradient = _ops.linear_topk_mse_frozen(hidden, weight, index, bias, mean, name, constant)
        grad_hidden += row_weight[:, None] * gradient
        return loss
    loss, slope = _ops.linear_topk_mse(hidden, weight, index, bias, mean, name, constant)
    _ops.linear_topk_backward(row_weight, slope, hidden, weight, index, mean, name == "global_mean", *grads)
    return loss


def linear_topk_unlikelihood_fwd_bwd(
    hidden: Tensor,
    weight: Tensor,
    index: Tensor,
    row_weight: Tensor,
    floor: float,
    bias: Tensor | None,
    grads: Grads,
) -> Tensor:
    """Compute `linear_topk_unlikelihood` of each row [R]; its gradient times `row_weight` [R] is added to `grads`."""
    loss, slope = _ops.linear_topk_unlikelihood(hidden, weight, index, bias, floor)
    _ops.linear_topk_backward(row_weight, slope, hidden, weight, index, None, False, *grads)
    return loss


def cross_entropy_(logits: Tensor, labels: Tensor, row_weight: Tensor) -> Tensor:
    """Compute the cross-entropy of each row [R]; `logits` [R, V] become its gradient times `row_weight` [R].

    `labels`: [R] int64. `row_weight` and the result: float64 for float64 logits, else float32.
    """
    return _ops.cross_entropy_(logits, labels, row_weight)


def kl_div_(logits: Tensor, ref_logits: Tensor, row_weight: Tensor, reverse: bool) -> Tensor:
    """Compute the KL divergence of each row [R]; `logits` [R, V] become its gradient times `row_weight` [R].

    With P = softmax(logits) and Q = softmax(ref_logits): KL(Q || P), or with `reverse` KL(P || Q).
    `ref_logits`: [R, V], the dtype of `logits`. `row_weight` and the result: float64 for float64 logits, else float32.
    """
    return _ops.kl_div_(logits, ref_logits, row_weight, reverse)


class GradientSum:
    """Adds up a gradient of the head, part by part; in float32 where several parts are bfloat16 or float16.

    Otherwise the parts are added to each other in the buffer that is the result.
    """

    def __init__(self, like: Tensor, several: bool):
        self.part = like.new_empty(like.shape)
        half = like.dtype in (torch.bfloat16, torch.float16)
        self.total = like.new_zeros(like.shape, dtype=torch.float32) if half and several else None
        self.begun = False  # whether ``part`` holds anything

    def _next(self) -> bool:
        """Add the last part to the total; whether the next one is to be added to what the buffer holds."""
        begun, self.begun = self.begun, True
        if self.total is None:
            return begun
        if begun:
            # On a CPU torch converts the whole addend first: block by block that is a megabyte.
            block = 2**18 if self.part.device.type == "cpu" else self.part.numel()
            for total, part in zip(self.total.view(-1).split(block), self.part.view(-1).split(block), strict=True):
                total += part
        return False

    def add_product(self, a: Tensor, b: Tensor) -> None:
        """Add ``a @ b``."""
        torch.addmm(self.part, a, b, beta=int(self._next()), out=self.part)

    def buffer(self) -> Tensor:
        """Return a buffer of the parts' dtype, to which the next part is to be added."""
        return self.part if self._next() else self.part.zero_()

    def result(self, dtype: torch.dtype) -> Tensor:
        """Return the sum for a leaf of this dtype: rounded once, if that is the parts' (under autocast it is not)."""
        begun = self._next()
        if self.total is None:
            return self.part if begun else self.part.zero_()
        return self.part.copy_(self.total) if dtype == self.part.dtype else self.total
