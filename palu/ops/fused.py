"""Losses with forward and backward in one call: the gradient is written over the input. No autograd.

For `palu.losses.fused_linear_losses` and the ops of `palu/ops/loss_ops.py`. A trailing underscore means, as in
torch, that the first argument is overwritten.
"""

import torch
from torch import Tensor

from palu.ops.functional import has_frozen, split_target, weight_mean

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
    grad_hidden, *grads_of_head = grads
    if grad_hidden is not None and grads_of_head == [None, None] and has_frozen(hidden, name):
        loss, gradient = _ops.linear_topk_mse_frozen(hidden, weight, index, bias, mean, name, constant)
        grad_hidden += row_weight[:, None] * gradient
        return loss
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


def softmax_(logits: Tensor, row_weight: Tensor) -> tuple[Tensor, Tensor]:
    """Overwrite logits [r, V] with their softmax times `row_weight` [r].

    `row_weight` and the results: float64 for float64 logits, else float32.

    Returns:
        The largest logit [r], and how far the logsumexp lies above it [r]: to log V. (Their sum would be rounded.)
    """
    top, where = logits.max(1)
    above = cross_entropy_(logits, where, row_weight)  # of the largest entry, logsumexp - top
    logits.scatter_(1, where[:, None], (row_weight * above.neg().exp())[:, None].to(logits.dtype))
    return top.to(row_weight.dtype), above


def group_sums(index: Tensor, values: Tensor) -> Tensor:
    """Add up the values [r, K] of equal entries of index [r, K] in a row; each of them gets the sum."""
    index = index.contiguous()  # else searchsorted warns
    groups = torch.searchsorted(index.sort(1).values, index)
    return torch.zeros_like(values).scatter_add_(1, groups, values).gather(1, groups)


def topk_kl_(
    logits: Tensor,
    row_weight: Tensor,
    index: Tensor,
    teacher_log_probs: Tensor,
    reverse: bool,
    bucket: bool,
    ignore_index: int,
) -> Tensor:
    """Compute the KL between a teacher's top K and softmax(logits) [r]; `logits` [r, V] become its gradient, weighted.

    With q_k the teacher's probabilities, p = softmax(z) and p_k = p at index[k]; what is not among the K is the rest:

        ignore   dz at index_k is c_k - p_k C, dz_v = -p_v C of the rest, with C = sum_k c_k
                 forward   sum_k q_k (log q_k - log p_k)          c_k = -q_k
                 reverse   sum_k p_k (log p_k - log q_k)          c_k = p_k (log p_k - log q_k + 1)
        bucket   the same sums with one term more, q_rest = 1 - sum_k q_k and p_rest = 1 - sum_k p_k. Over the rest,
                 dz_v is shared out as p_v / p_rest = softmax(z over the rest)_v. m = sum_k q_k + q_rest is 1.
                 forward   dz at index_k: m p_k - q_k             dz of the rest: m p_rest - q_rest
                 reverse   dz at index_k: p_k (log p_k - log q_k - loss)       the rest likewise

    log p_rest is taken from the rest's own logsumexp, so that it is finite and exact where p_rest is nearly nothing.
    What belongs to index_k is formed in float32 and rounded once: as a difference of bfloat16 numbers p_k - q_k would
    be wrong by all of it where both are nearly the same.

    Args:
        index: [r, K], distinct in a row; `ignore_index` marks entries that are not there, and each row has one that is.
        teacher_log_probs: [r, K].
    """
    dtype = row_weight.dtype
    there = index != ignore_index
    first = there.to(torch.uint8).argmax(1, keepdim=True)
    i = torch.where(there, index, index.gather(1, first)).long()  # what is not there writes what the first one does
    log_q = teacher_log_probs.to(dtype).masked_fill(~there, -torch.inf)
    q = log_q.exp()
    z = logits.gather(1, i).to(dtype)
    if not bucket:
        top, above = softmax_(logits, torch.ones_like(row_weight) if reverse else row_weight * q.sum(1))
        log_p = (z - top[:, None]) - above[:, None]
        p = log_p.exp()
        if reverse:
            ratio = (log_p - log_q).masked_fill(~there, 0)
            loss = _times(p, ratio).sum(1)
            c = _times(p, ratio + 1).masked_fill(~there, 0)
            logits.mul_((-row_weight * c.sum(1))[:, None])
        else:
            loss, c = _times(q, log_q - log_p).sum(1), -q
        of_kept = c - p * c.sum(1, keepdim=True)
        of_kept = torch.where(there, of_kept, of_kept.gather(1, first)) * row_weight[:, None]
        logits.scatter_(1, i, of_kept.to(logits.dtype))
        return loss

    lowest = torch.finfo(logits.dtype).min
    logits.scatter_(1, i, lowest)
    top, above = softmax_(logits, torch.ones_like(row_weight))
    top = top.masked_fill(top == lowest, -torch.inf)  # nothing but the K
    z = z.masked_fill(~there, -torch.inf)
    highest = torch.maximum(top, z.amax(1))
    z, lse_rest = z - highest[:, None], (top - highest) + above
    lse = torch.logaddexp(z.logsumexp(1), lse_rest)
    log_p, log_p_rest = z - lse[:, None], lse_rest - lse
    p, p_rest = log_p.exp(), log_p_rest.exp()
    q_rest = (1 - q.sum(1)).clamp(min=0).masked_fill(top == -torch.inf, 0)
    if reverse:
        ratio = log_p - log_q
        ratio_rest = log_p_rest - q_rest.clamp(min=torch.finfo(dtype).eps).log()
        loss = _times(p, ratio).sum(1) + _times(p_rest, ratio_rest)
        of_kept, of_rest = _times(p, ratio - loss[:, None]), _times(p_rest, ratio_rest - loss)
    else:
        loss = _times(q, log_q - log_p).sum(1) + _times(q_rest, q_rest.log() - log_p_rest)
        mass = q.sum(1) + q_rest
        of_kept, of_rest = mass[:, None] * p - q, mass * p_rest - q_rest
    logits.mul_((row_weight * of_rest)[:, None])
    of_kept = torch.where(there, of_kept, of_kept.gather(1, first)) * row_weight[:, None]
    logits.scatter_(1, i, of_kept.to(logits.dtype))
    return loss


def _times(probability: Tensor, value: Tensor) -> Tensor:
    """0 where the probability is 0, whatever the value."""
    return torch.where(probability > 0, probability * value, 0)


def scale_(tensor: Tensor, factor: Tensor) -> None:
    """Multiply a tensor by a scalar tensor: free where that is 1, and without waiting for a GPU."""
    _ops.scale_(tensor, factor)


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
