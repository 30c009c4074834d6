"""Plain-torch twins of the native ops: the same arguments, but for `impl`. Importing this module compiles nothing.

Tests and benchmarks compare the ops with them, and they are the kernels where there is no native one
(`palu/ops/twins.py`). What each computes, and the shapes it takes, stands in `csrc/*.h`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which sums over values of `dtype` are kept."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def softcap_(logits: Tensor, softcap: float, *, slope: bool = False) -> Tensor | None:
    """Cap logits [R, V] in place: softcap * tanh(logits / softcap); return the slope 1 - tanh^2 if it is asked for.

    In bfloat16 and float16 both are computed in float32, a sixteenth of the rows at a time, and rounded once. From
    rounded logits the slope would be wrong: in bfloat16 by up to 2 % at 0.9 of the cap, and by all of it near the cap.
    """
    exact = acc_dtype(logits.dtype)
    slopes = torch.empty_like(logits) if slope else None
    rows = len(logits) if logits.dtype == exact else -(-len(logits) // 16)
    for start in range(0, len(logits), max(rows, 1)):
        part = slice(start, start + rows)
        t = logits[part].to(exact).div_(softcap).tanh_()
        if slopes is not None:
            torch.addcmul(t.new_ones(()), t, t, value=-1, out=slopes[part])
        torch.mul(t, softcap, out=logits[part])
    return slopes


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
    return topk_mse_and_slope(logits, index, target)[0]


def topk_mse_and_slope(logits: Tensor, index: Tensor, target: str | float = "global_mean") -> tuple[Tensor, Tensor]:
    """Compute `topk_mse` [R], and its derivative for the kept logits [R, K] with the target held constant."""
    kept = logits.gather(1, index.long()).to(acc_dtype(logits.dtype))
    if target == "local_mean":
        c: Tensor | float = kept.mean(1, keepdim=True)
    elif target in ("global_mean", "global_mean_detached"):
        c = logits.mean(1, keepdim=True, dtype=acc_dtype(logits.dtype))
        c = c.detach() if target == "global_mean_detached" else c
    else:
        c = float(target)
    difference = kept - c
    return difference.square().mean(1), difference * (2 / max(index.shape[1], 1))


def topk_unlikelihood(logits: Tensor, index: Tensor, floor: float = 0.0) -> Tensor:
    """Twin of `palu.topk_unlikelihood`."""
    return topk_unlikelihood_and_slope(logits, index, floor)[0]


def topk_unlikelihood_and_slope(logits: Tensor, index: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """Compute `topk_unlikelihood` [R], and its derivative for the logits [R, K] of true token and candidates."""
    kept = logits.gather(1, index.long()).to(acc_dtype(logits.dtype))
    others = kept[:, 1:].masked_fill(index[:, 1:] == index[:, :1], float("-inf"))
    alone = (others == float("-inf")).all(1)
    others = others.masked_fill(alone[:, None], 0)  # else the softmax of nothing, which is NaN
    largest = others.detach().amax(1)  # taken away first: a logsumexp near 1e4 would be rounded as such a number
    margin = (kept[:, 0] - largest) - (others - largest[:, None]).logsumexp(1)
    probability = margin.sigmoid()
    pushed = ~(probability <= floor) & ~alone  # a NaN stays one
    loss = torch.logaddexp(margin, torch.zeros_like(margin)).where(pushed, 0)
    probability = probability.where(pushed, 0)[:, None]
    return loss, torch.cat([probability, -probability * others.softmax(1)], 1)


def topk_backward(grad: Tensor, slope: Tensor, index: Tensor, through_mean: bool, grad_logits: Tensor) -> None:
    """Twin of the backward pass of `topk_mse` and `topk_unlikelihood`: `grad_logits` become the gradient."""
    of_kept, of_all = _of_logits(grad, slope, index, through_mean, grad_logits.shape[1])
    grad_logits.copy_(of_kept.add_(of_all))


def _of_logits(
    grad: Tensor, slope: Tensor, index: Tensor, through_mean: bool, vocab_size: int
) -> tuple[Tensor, Tensor]:
    """(what each logit receives for being kept [R, V], what all logits of a row receive through the mean [R, 1])."""
    g = grad[:, None] * slope
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


def linear_topk_unlikelihood(
    hidden: Tensor, weight: Tensor, index: Tensor, floor: float = 0.0, bias: Tensor | None = None
) -> Tensor:
    """Twin of `palu.linear_topk_unlikelihood`; it forms the logits."""
    return topk_unlikelihood(F.linear(hidden, weight, bias), index, floor)


def linear_topk_backward(
    grad: Tensor,
    slope: Tensor,
    hidden: Tensor,
    weight: Tensor,
    index: Tensor,
    weight_mean: Tensor | None,
    through_mean: bool,
    grad_hidden: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
) -> None:
    """Twin of the backward pass of both losses of hidden states, which adds to the gradients; it forms the logits'."""
    vocab_size = weight.shape[0]
    of_kept, of_all = _of_logits(grad, slope, index, through_mean, vocab_size)
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
    """Twin of `palu.ops.cross_entropy_`."""
    z = logits.to(row_weight.dtype)  # the same tensor unless a half type
    label, weight = labels[:, None], row_weight[:, None]
    picked = z.gather(1, label)[:, 0]
    top, where = z.max(1) if z.numel() else (picked, labels)
    torch.softmax(z, 1, out=z)
    # At the largest logit softmax cannot underflow, and there z - log softmax(z) = logsumexp(z).
    loss = top - z.gather(1, where[:, None])[:, 0].log() - picked
    _write(logits, z.mul_(weight).scatter_add_(1, label, -weight))
    return loss


def kl_div_(logits: Tensor, ref_logits: Tensor, row_weight: Tensor, reverse: bool) -> Tensor:
    """Twin of `palu.ops.kl_div_`."""
    log_p = logits.to(row_weight.dtype)
    torch.log_softmax(log_p, 1, out=log_p)
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
    _write(logits, gradient.mul_(row_weight[:, None]))
    return loss


def _write(logits: Tensor, gradient: Tensor) -> None:
    if gradient is not logits:
        logits.copy_(gradient)


def _row_dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.bmm(a[:, None, :], b[:, :, None])[:, 0, 0]


def adamw_(
    weight: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    low_bits: Tensor | None,
    clip_factor: Tensor | None,
    step: int,
    rate: float,
    weight_decay: float,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    """Twin of `palu.ops.adamw_`."""
    unbias, acc = (1 - beta2**step) ** 0.5, acc_dtype(weight.dtype)
    step_size = rate * unbias / (1 - beta1**step)
    tensors = [weight, grad, exp_avg, exp_avg_sq, weight if low_bits is None else low_bits]
    tensors = [torch.atleast_1d(tensor) for tensor in tensors]
    # A step's float32 copies are small. On a CPU what a slice needs stays in the cache; on a GPU each launches a dozen
    # kernels.
    most = 2**18 if weight.device.type == "cpu" else 2**24
    rows = max(1, most * len(tensors[0]) // max(1, weight.numel()))
    for p, g, m, v, low in zip(*(tensor.split(rows) for tensor in tensors), strict=True):
        if clip_factor is not None:
            g = g.to(acc) * clip_factor
        m.copy_(torch.lerp(m.to(acc), g.to(acc), 1 - beta1))
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        w = p
        if low_bits is not None:
            w = p.float()
            bits = w.view(torch.int32).add_(low.view(torch.int16))
        if weight_decay:
            w.mul_(1 - rate * weight_decay)
        w.addcdiv_(m, v.sqrt().add_(eps * unbias), value=-step_size)
        if low_bits is not None:
            low.view(torch.int16).copy_(bits)  # the lower 16, with a sign: so the upper ones are rounded
            p.view(torch.int16).copy_(bits.add_(2**15).bitwise_right_shift_(16))
