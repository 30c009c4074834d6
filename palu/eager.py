"""Plain-torch twins of the native ops, with the same signatures. Importing this module compiles nothing.

Tests and benchmarks compare the ops with them. Formulas: PALU, arXiv 2601.03190.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["cross_entropy_", "kl_div_", "linear_topk_mse", "prefix_mask", "topk_mse"]


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which sums over values of `dtype` are kept."""
    return torch.float64 if dtype == torch.float64 else torch.float32


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
    kept = logits.gather(1, index.long()).to(acc_dtype(logits.dtype))
    if target == "local_mean":
        c: Tensor | float = kept.mean(1, keepdim=True)
    elif target in ("global_mean", "global_mean_detached"):
        c = logits.mean(1, keepdim=True, dtype=acc_dtype(logits.dtype))
        c = c.detach() if target == "global_mean_detached" else c
    else:
        c = float(target)
    return (kept - c).square().mean(1)


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


def cross_entropy_(logits: Tensor, labels: Tensor, row_weight: Tensor) -> Tensor:
    """Cross-entropy of each row; `logits` become its gradient times `row_weight`.

    Args:
        logits: [R, V] float, overwritten.
        labels: [R] int64.
        row_weight: [R] float64 for float64 logits, else float32.

    Returns:
        [R], `logsumexp(z) - z[label]`, not weighted, in the dtype of `row_weight`.
    """
    z = logits.to(row_weight.dtype)  # the same tensor unless a half type
    label = labels[:, None]
    picked = z.gather(1, label)[:, 0]
    top, where = z.max(1) if z.numel() else (picked, labels)
    probability = torch.softmax(z, 1, out=z)
    # At the largest logit softmax cannot underflow, and there z - log softmax(z) = logsumexp(z).
    loss = top - probability.gather(1, where[:, None])[:, 0].log() - picked
    probability.mul_(row_weight[:, None]).scatter_add_(1, label, -row_weight[:, None])
    if z is not logits:
        logits.copy_(z)
    return loss


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
    z = logits.to(row_weight.dtype)  # the same tensor unless a half type
    log_p = torch.log_softmax(z, 1, out=z)
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
    gradient.mul_(row_weight[:, None])
    if z is not logits:
        logits.copy_(z)
    return loss


def _row_dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.bmm(a[:, None, :], b[:, :, None])[:, 0, 0]
