"""Plain-torch twins of the native ops, with the same signatures. Importing this module compiles nothing.

Tests and benchmarks compare the ops with them, and they serve devices without native kernels (`palu/ops/twins.py`).
Formulas: PALU, arXiv 2601.03190.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "cross_entropy_",
    "kl_div_",
    "linear_cross_entropy",
    "linear_kl",
    "linear_topk_kl",
    "linear_topk_log_probs",
    "linear_topk_logits",
    "linear_topk_mse",
    "linear_topk_mse_backward",
    "prefix_mask",
    "scale_",
    "topk_mse",
    "topk_mse_backward",
    "topk_residual",
]


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which sums over values of `dtype` are kept."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def softcap_(logits: Tensor, softcap: float, *, slope: bool = False) -> Tensor | None:
    """Cap contiguous logits in place: softcap * tanh(logits / softcap); return the slope 1 - tanh^2 if it is asked for.

    In bfloat16 and float16 both are computed in float32, a sixteenth of the logits at a time, and rounded once. From
    rounded logits the slope would be wrong: in bfloat16 by up to 2 % at 0.9 of the cap, and by all of it near the cap.
    Rounded itself it is right to 0.4 %, as the gradient is that it is multiplied by.
    """
    flat = logits.view(-1)
    size = max(len(flat) if logits.dtype == acc_dtype(logits.dtype) else -(-len(flat) // 16), 1)
    slopes = torch.empty_like(flat) if slope else None
    for start in range(0, len(flat), size):
        part = slice(start, start + size)
        t = flat[part].to(acc_dtype(logits.dtype)).div_(softcap).tanh_()
        if slopes is not None:
            torch.addcmul(t.new_ones(()), t, t, value=-1, out=slopes[part])
        torch.mul(t, softcap, out=flat[part])
    return None if slopes is None else slopes.view_as(logits)


def prefix_mask(labels: Tensor, n: int, eos_token_id: int | None = None) -> Tensor:
    """Twin of `palu.prefix_mask`."""
    sensitive = labels >= 0
    if eos_token_id is not None:
        sensitive &= labels != eos_token_id
    if n == -1:
        return sensitive
    # A token's place in its span is its distance to the last token that is not sensitive.
    places = torch.arange(1, labels.shape[1] + 1, device=labels.device).expand_as(labels)
    last_outside = torch.where(sensitive, 0, places)
    if labels.numel():
        last_outside = last_outside.cummax(1).values
    return sensitive & (places - last_outside <= n)


def topk_mse(logits: Tensor, index: Tensor, target: str | float = "global_mean") -> Tensor:
    """Twin of `palu.topk_mse`."""
    return topk_residual(logits, index, target).square().mean(1)


def topk_residual(logits: Tensor, index: Tensor, target: str | float = "global_mean") -> Tensor:
    """Compute the distances [R, K] of the kept logits from the target, whose mean square is `topk_mse`."""
    kept = logits.gather(1, index.long()).to(acc_dtype(logits.dtype))
    if target == "local_mean":
        c: Tensor | float = kept.mean(1, keepdim=True)
    elif target in ("global_mean", "global_mean_detached"):
        c = logits.mean(1, keepdim=True, dtype=acc_dtype(logits.dtype))
        c = c.detach() if target == "global_mean_detached" else c
    else:
        c = float(target)
    return kept - c


def topk_mse_backward(grad: Tensor, residual: Tensor, index: Tensor, through_mean: bool, grad_logits: Tensor) -> None:
    """Twin of the backward pass of `topk_mse`: `grad_logits` [R, V] become the gradient (`csrc/topk_mse.h`).

    Args:
        grad: [R], of the losses.
        residual: [R, K], of `topk_residual`, in the dtype of `grad`.
        index: [R, K].
        through_mean: whether the gradient flows through the mean over the vocabulary.
        grad_logits: [R, V], overwritten.
    """
    of_kept, of_all = _of_logits(grad, residual, index, through_mean, grad_logits.shape[1])
    grad_logits.copy_(of_kept.add_(of_all))


def _of_logits(
    grad: Tensor, residual: Tensor, index: Tensor, through_mean: bool, vocab_size: int
) -> tuple[Tensor, Tensor]:
    """(what each logit receives for being kept [R, V], what all logits of a row receive through the mean [R, 1])."""
    g = 2 / max(index.shape[1], 1) * grad[:, None] * residual
    of_kept = grad.new_zeros(len(grad), vocab_size).scatter_add_(1, index.long(), g)
    of_all = -g.sum(1, keepdim=True) / max(vocab_size, 1) if through_mean else torch.zeros_like(grad[:, None])
    return of_kept, of_all


def linear_topk_mse(
    hidden: Tensor,
    weight: Tensor,
    index: Tensor,
    target: str | float = "global_mean",
    bias: Tensor | None = None,
    *,
    weight_mean: Tensor | None = None,
) -> Tensor:
    """Twin of `palu.linear_topk_mse`; it forms the logits, so it has no use for `weight_mean`."""
    return topk_mse(F.linear(hidden, weight, bias), index, target)


def linear_topk_mse_backward(
    grad: Tensor,
    residual: Tensor,
    hidden: Tensor,
    weight: Tensor,
    index: Tensor,
    weight_mean: Tensor | None,
    through_mean: bool,
    grad_hidden: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
) -> None:
    """Twin of the backward pass of `linear_topk_mse`: the gradient is added (`csrc/linear_topk_mse.h`).

    It forms the gradient of the logits [R, V], and copies `hidden` and `weight` to the dtype of `grad`.

    Args:
        grad, residual, index, through_mean: as in `topk_mse_backward`.
        hidden: [R, d].
        weight: [V, d].
        weight_mean: [d], the mean row of `weight`; needed for `grad_hidden` where `through_mean`.
        grad_hidden, grad_weight, grad_bias: [R, d], [V, d] and [V], added to; None: not asked for.
    """
    vocab_size = weight.shape[0]
    of_kept, of_all = _of_logits(grad, residual, index, through_mean, vocab_size)
    if grad_hidden is not None:
        sums = of_kept @ weight.to(grad.dtype)
        if through_mean and weight_mean is not None:
            sums += vocab_size * of_all * weight_mean
        grad_hidden += sums
    of_logits = of_kept.add_(of_all)
    if grad_weight is not None:
        grad_weight += of_logits.t() @ hidden.to(grad.dtype)
    if grad_bias is not None:
        grad_bias += of_logits.sum(0)


def cross_entropy_(logits: Tensor, labels: Tensor, row_weight: Tensor) -> Tensor:
    """Cross-entropy of each row; `logits` become its gradient times `row_weight`.

    Args:
        logits: [R, V] float, overwritten.
        labels: [R] int64.
        row_weight: [R] float64 for float64 logits, else float32.

    Returns:
        [R], `logsumexp(z) - z[label]`, not weighted, in the dtype of `row_weight`.
    """
    z = logits.to(row_weight.dtype)
    label = labels[:, None]
    picked = z.gather(1, label)[:, 0]
    top, where = z.max(1) if z.numel() else (picked, labels)
    probability = torch.softmax(z, 1)
    # At the largest logit softmax cannot underflow, and there z - log softmax(z) = logsumexp(z).
    loss = top - probability.gather(1, where[:, None])[:, 0].log() - picked
    logits.copy_(probability.mul_(row_weight[:, None]).scatter_add_(1, label, -row_weight[:, None]))
    return loss


def unlikelihood_(logits: Tensor, labels: Tensor, row_weight: Tensor, floor: float) -> Tensor:
    """Unlikelihood of each row's label (arXiv 1908.04319); `logits` become its gradient times `row_weight`.

    Args:
        logits: [R, V] float, V > 1, overwritten.
        labels: [R] int64.
        row_weight: [R] float64 for float64 logits, else float32.
        floor: in [0, 1): a label that is not more probable than this has the loss 0 and the gradient 0.

    Returns:
        [R], `-log(1 - p[label])`, not weighted, in the dtype of `row_weight`.
    """
    z = logits.to(row_weight.dtype, copy=True)
    label = labels[:, None]
    picked = z.gather(1, label)[:, 0]
    z.scatter_(1, label, float("-inf"))
    top, where = z.max(1)
    others = torch.softmax(z, 1)
    # As in cross_entropy_: the logsumexp of the others.
    margin = picked - (top - others.gather(1, where[:, None])[:, 0].log())
    probability = margin.sigmoid()
    pushed = ~(probability <= floor)  # a NaN stays one
    weight = (row_weight * probability * pushed)[:, None]
    logits.copy_(others.mul_(-weight).scatter_(1, label, weight))
    return torch.logaddexp(margin, torch.zeros_like(margin)) * pushed


def kl_div_(logits: Tensor, ref_logits: Tensor, row_weight: Tensor, reverse: bool) -> Tensor:
    """KL divergence of each row; `logits` become its gradient times `row_weight`.

    With P = softmax(logits) and Q = softmax(ref_logits): KL(Q || P), whose gradient is P - Q, or with
    `reverse` KL(P || Q), whose gradient is P * (log P - log Q - KL).

    Args:
        logits: [R, V] float, overwritten.
        ref_logits: [R, V], the dtype of `logits`.
        row_weight: [R] float64 for float64 logits, else float32.

    Returns:
        [R], not weighted, in the dtype of `row_weight`.
    """
    log_p = torch.log_softmax(logits, 1, dtype=row_weight.dtype)
    log_q = torch.log_softmax(ref_logits, 1, dtype=row_weight.dtype)
    if reverse:
        log_ratio = log_q.neg_().add_(log_p)
        p = log_p.exp_()
        loss = _row_dot(p, log_ratio)
        gradient = p.mul_(log_ratio.sub_(loss[:, None]))
    else:
        q = log_q.exp()
        loss = _row_dot(q, log_q.sub_(log_p))
        gradient = log_p.exp_().sub_(q)
    logits.copy_(gradient.mul_(row_weight[:, None]))
    return loss


def linear_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None = None, softcap: float | None = None, scale: float = 1.0
) -> Tensor:
    """Compute the logits [..., V] of a head that may be scaled and capped, in the dtype of sums."""
    logits = F.linear(hidden, weight, bias)
    logits = logits.to(acc_dtype(logits.dtype)) * scale
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def linear_topk_logits(
    hidden: Tensor,
    weight: Tensor,
    index: Tensor,
    bias: Tensor | None = None,
    *,
    softcap: float | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Twin of `palu.ops.linear_topk_logits`."""
    return linear_logits(hidden, weight, bias, softcap, scale).gather(-1, index.long())


def linear_topk_log_probs(
    hidden: Tensor,
    weight: Tensor,
    index: Tensor,
    bias: Tensor | None = None,
    *,
    softcap: float | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Twin of `palu.ops.linear_topk_log_probs`."""
    return linear_logits(hidden, weight, bias, softcap, scale).log_softmax(-1).gather(-1, index.long())


def linear_topk_kl(
    hidden: Tensor,
    weight: Tensor,
    index: Tensor,
    teacher_log_probs: Tensor,
    bias: Tensor | None = None,
    *,
    direction: str = "forward",
    tail: str = "ignore",
    ignore_index: int = -100,
    reduction: str = "mean",
    softcap: float | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Twin of `palu.ops.linear_topk_kl`."""
    log_all = linear_logits(hidden, weight, bias, softcap, scale).log_softmax(-1)
    there = index != ignore_index
    # One entry more, for what is not there: neither distribution has anything in it.
    nowhere = torch.full_like(log_all[..., :1], -torch.inf)
    i = torch.where(there, index.long(), log_all.shape[-1])
    log_p = torch.cat([log_all, nowhere], -1).gather(-1, i)
    log_q = torch.where(there, teacher_log_probs.to(log_p.dtype), -torch.inf)
    if tail == "bucket":
        kept = torch.cat([torch.zeros_like(log_all), nowhere], -1).scatter(-1, i, 1)[..., :-1] == 1
        rest = log_all.masked_fill(kept, -torch.inf)
        some = ~kept.all(-1, keepdim=True)
        log_p_rest = torch.where(some, rest.masked_fill(~some, 0).logsumexp(-1, keepdim=True), -torch.inf)
        q_rest = (1 - log_q.exp().sum(-1, keepdim=True)).clamp(min=0) * some
        if direction == "reverse":
            q_rest = q_rest.clamp(min=torch.finfo(q_rest.dtype).eps)
        log_p, log_q = torch.cat([log_p, log_p_rest], -1), torch.cat([log_q, q_rest.log()], -1)
    log_p, log_q = (log_q, log_p) if direction == "forward" else (log_p, log_q)
    nothing = log_p == -torch.inf  # of the distribution that comes first
    ratio = log_p.masked_fill(nothing, 0) - log_q.masked_fill(nothing, 0)
    losses = (log_p.exp() * ratio).sum(-1)
    return _reduced(losses, there.any(-1), reduction)


def linear_kl(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    *,
    labels: Tensor | None = None,
    direction: str = "forward",
    ignore_index: int = -100,
    reduction: str = "mean",
    softcap: float | None = None,
    scale: float = 1.0,
    ref_softcap: float | None = None,
    ref_scale: float = 1.0,
) -> Tensor:
    """Twin of `palu.ops.linear_kl`."""
    log_p = linear_logits(hidden, weight, bias, softcap, scale).log_softmax(-1)
    log_q = linear_logits(ref_hidden, ref_weight, ref_bias, ref_softcap, ref_scale).log_softmax(-1).detach()
    given, wanted = (log_p, log_q) if direction == "forward" else (log_q, log_p)
    losses = F.kl_div(given, wanted.to(given.dtype), log_target=True, reduction="none").sum(-1)
    counts = torch.ones_like(losses, dtype=torch.bool) if labels is None else labels != ignore_index
    return _reduced(losses, counts, reduction)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    shift: bool = False,
    ignore_index: int = -100,
    reduction: str = "mean",
    softcap: float | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Twin of `palu.ops.linear_cross_entropy`."""
    if shift:
        hidden, labels = hidden[..., :-1, :], labels[..., 1:]
    logits = linear_logits(hidden, weight, bias, softcap, scale)
    options: dict[str, Any] = {"ignore_index": ignore_index, "reduction": "none"}
    losses = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), **options).view(labels.shape)
    return _reduced(losses, labels != ignore_index, reduction)


def _reduced(losses: Tensor, counts: Tensor, reduction: str) -> Tensor:
    losses = torch.where(counts, losses, 0)
    if reduction == "none":
        return losses
    return losses.sum() / (counts.sum().clamp(min=1) if reduction == "mean" else 1)


def scale_(tensor: Tensor, factor: Tensor) -> None:
    """Multiply a contiguous tensor by a scalar tensor, float32 or float64, in place."""
    tensor.view(-1).mul_(factor.view(1))  # one dimension: a scalar would be rounded to the tensor's dtype first


def _row_dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.bmm(a[:, None, :], b[:, :, None])[:, 0, 0]
