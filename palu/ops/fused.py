"""Losses with forward and backward in one call: the gradient is written over the input. No autograd.

For `palu.losses.fused_linear_losses`. A trailing underscore means, as in torch, that the first argument is overwritten.
"""

import torch
from torch import Tensor

from palu.ops.functional import split_target, weight_mean

_ops = torch.ops.palu


def topk_mse_fwd_bwd_(logits: Tensor, index: Tensor, row_weight: Tensor, target: str | float) -> Tensor:
    """Compute `topk_mse` of each row [R]; `logits` [R, V] become its gradient times `row_weight` [R]."""
    name, constant = split_target(target)
    loss, residual = _ops.topk_mse(logits, index, name, constant)
    _ops.topk_mse_backward(row_weight, residual, index, name == "global_mean", logits)
    return loss


def linear_topk_mse_fwd_bwd(
    hidden: Tensor,
    weight: Tensor,
    index: Tensor,
    row_weight: Tensor,
    target: str | float,
    bias: Tensor | None,
    mean: Tensor | None,
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> Tensor:
    """Compute `linear_topk_mse` of each row [R]; its gradient times `row_weight` [R] is added to `grads`.

    Args:
        mean: [d], `weight_mean(weight)`; None: computed here.
        grads: those of hidden [R, d], weight [V, d] and bias [V]; None: not asked for.
    """
    name, constant = split_target(target)
    if mean is None and name.startswith("global_mean"):
        mean = weight_mean(weight)
    loss, residual = _ops.linear_topk_mse(hidden, weight, index, bias, mean, name, constant)
    _ops.linear_topk_mse_backward(row_weight, residual, hidden, weight, index, mean, name == "global_mean", *grads)
    return loss


def cross_entropy_(logits: Tensor, labels: Tensor, row_weight: Tensor) -> Tensor:
    """Compute the cross-entropy of each row [R]; `logits` [R, V] become its gradient times `row_weight` [R].

    `labels`: [R] int64. `row_weight` and the result: float64 for float64 logits, else float32.
    """
    return _ops.cross_entropy_(logits, labels, row_weight)


def unlikelihood_(logits: Tensor, labels: Tensor, row_weight: Tensor, floor: float) -> Tensor:
    """Compute `-log(1 - p)` of each row's label [R]; `logits` [R, V] become its gradient times `row_weight` [R].

    A label whose probability p is not above `floor` has the loss 0 and the gradient 0 (arXiv 1908.04319, with a floor).
    `labels`: [R] int64. `row_weight` and the result: float64 for float64 logits, else float32.
    """
    return _ops.unlikelihood_(logits, labels, row_weight, floor)


def kl_div_(logits: Tensor, ref_logits: Tensor, row_weight: Tensor, reverse: bool) -> Tensor:
    """Compute the KL divergence of each row [R]; `logits` [R, V] become its gradient times `row_weight` [R].

    With P = softmax(logits) and Q = softmax(ref_logits): KL(Q || P), or with `reverse` KL(P || Q).
    `ref_logits`: [R, V], the dtype of `logits`. `row_weight` and the result: float64 for float64 logits, else float32.
    """
    return _ops.kl_div_(logits, ref_logits, row_weight, reverse)


def scale_(tensor: Tensor, factor: Tensor) -> None:
    """Multiply a tensor by a scalar tensor: free where that is 1, and without waiting for a GPU."""
    _ops.scale_(tensor, factor)
