"""The ops of `linear_topk_logits` and `linear_topk_log_probs`.

With g[r, k] the gradient for log p at index[r, k], and G = sum_k g_k:

    dz_v = sum_{k: index_k = v} g_k - p_v G

For a trainable head that takes all probabilities, so the backward pass computes the logits again. For a frozen one the
forward pass keeps the part of the entries that were not chosen, E = sum_{v not in index} p_v W[v] [R, d], and

    dh = sum_k c_k W[index_k] - G E,    c_k = g_k - G p_k / (how often index_k stands in its row)

With a cap, its slope is in E's sum and on each c_k.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from palu.eager import acc_dtype
from palu.ops.chunks import GRADIENTS, HEAD, Gradients, chunk_logits, define, fake_gradients, split_rows
from palu.ops.functional import use_gather
from palu.ops.fused import group_sums, softmax_
from palu.ops.library import check_index_values, first_order_only

_ops = torch.ops.palu


def _topk_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, gather: bool, chunk_bytes: int
) -> Tensor:
    if gather:  # the residual for the target 0 is the logit itself
        return _ops.linear_topk_mse(hidden, weight, index, bias, None, "constant", 0.0)[1]
    check_index_values("palu::linear_topk_logits", index, weight.shape[0])
    result = hidden.new_empty(index.shape, dtype=acc_dtype(hidden.dtype))
    rows = torch.arange(len(hidden), device=hidden.device)
    for chunk in split_rows(rows, weight, chunk_bytes, 1, False):
        logits = F.linear(hidden[chunk], weight, bias)
        result.index_copy_(0, chunk, logits.gather(1, index[chunk].long()).to(result.dtype))
        del logits
    return result


def _topk_logits_backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor,
    gather: bool,
    chunk_bytes: int,
    wanted: Sequence[bool],
) -> tuple[Tensor, ...]:
    if gather:
        # The kernel multiplies the residual by 2 / K times the loss's gradient; here the residual is the gradient.
        half = grad.new_full((len(grad),), index.shape[1] / 2)
        zeros = [
            t.new_zeros(t.shape) if t is not None and is_wanted else weight.new_zeros(0)
            for t, is_wanted in zip((hidden, weight, bias), wanted, strict=True)
        ]
        buffers = [t if is_wanted else None for t, is_wanted in zip(zeros, wanted, strict=True)]
        if len(grad):
            _ops.linear_topk_mse_backward(half, grad, hidden, weight, index, None, False, *buffers)
        return tuple(zeros)
    rows = torch.arange(len(hidden), device=hidden.device)
    chunks = split_rows(rows, weight, chunk_bytes, 1, False)
    gradients = Gradients(hidden, weight, bias, wanted, len(chunks) > 1)
    for chunk in chunks:
        of_logits = weight.new_zeros(len(chunk), weight.shape[0])
        of_logits.scatter_add_(1, index[chunk].long(), grad[chunk].to(of_logits.dtype))
        gradients.add(of_logits, hidden[chunk], chunk)
        del of_logits
    return gradients.results()


def _topk_log_probs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor,
    softcap: float | None,
    frozen: bool,
    chunk_bytes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    check_index_values("palu::linear_topk_log_probs", index, weight.shape[0])
    acc = acc_dtype(hidden.dtype)
    result = hidden.new_empty(index.shape, dtype=acc)
    others = hidden.new_empty(hidden.shape if frozen else 0)
    slopes = hidden.new_empty(index.shape if frozen and softcap is not None else 0)
    rows = torch.arange(len(hidden), device=hidden.device)
    copies = 1 + (softcap is not None and frozen)
    for chunk in split_rows(rows, weight, chunk_bytes, copies, softcap is not None):
        logits, slope = chunk_logits(hidden[chunk], weight, bias, softcap, slope=frozen)
        i = index[chunk].long()
        kept = logits.gather(1, i).to(acc)
        top, above = softmax_(logits, kept.new_ones(len(kept)))
        result.index_copy_(0, chunk, (kept - top[:, None]) - above[:, None])
        if slope is not None:
            slopes.index_copy_(0, chunk, slope.gather(1, i))
            logits *= slope
        if frozen:
            others.index_copy_(0, chunk, logits.scatter_(1, i, 0) @ weight)
        del logits, slope
    return result, others, slopes


def _topk_log_probs_backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor,
    softcap: float | None,
    chunk_bytes: int,
    wanted: Sequence[bool],
) -> tuple[Tensor, ...]:
    copies = 1 + (softcap is not None)
    rows = torch.arange(len(hidden), device=hidden.device)
    chunks = split_rows(rows, weight, chunk_bytes, copies, softcap is not None)
    gradients = Gradients(hidden, weight, bias, wanted, len(chunks) > 1)
    for chunk in chunks:
        h, g = hidden[chunk], grad[chunk]
        logits, slope = chunk_logits(h, weight, bias, softcap, slope=True)
        i = index[chunk].long()
        kept = logits.gather(1, i).to(g.dtype)
        top, above = softmax_(logits, -g.sum(1))
        p = ((kept - top[:, None]) - above[:, None]).exp()
        # In float32, and rounded once: in bfloat16 1 - p would be nothing where p is near 1.
        logits.scatter_(1, i, (group_sums(i, g) - p * g.sum(1, keepdim=True)).to(logits.dtype))
        if slope is not None:
            logits *= slope
        gradients.add(logits, h, chunk)
        del logits, slope
    return gradients.results()


def _fake_values(hidden: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, *_: Any) -> Tensor:
    return hidden.new_empty(index.shape, dtype=acc_dtype(hidden.dtype))


def _fake_log_probs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, softcap: float | None, frozen: bool, _: int
) -> tuple[Tensor, Tensor, Tensor]:
    slopes = hidden.new_empty(index.shape if frozen and softcap is not None else 0)
    return _fake_values(hidden, weight, bias, index), hidden.new_empty(hidden.shape if frozen else 0), slopes


def _fake_backward(_: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    return fake_gradients(hidden, weight, bias, rest[-1])


_topk_logits_op = define(
    "linear_topk_logits", f"{HEAD}, Tensor index, bool gather, int chunk_bytes", "Tensor", _topk_logits, _fake_values
)
_topk_logits_backward_op = define(
    "linear_topk_logits_backward",
    f"Tensor grad, {HEAD}, Tensor index, bool gather, int chunk_bytes, bool[3] wanted",
    f"({GRADIENTS})",
    _topk_logits_backward,
    _fake_backward,
)
_topk_log_probs_op = define(
    "linear_topk_log_probs",
    f"{HEAD}, Tensor index, float? softcap, bool frozen, int chunk_bytes",
    "(Tensor log_probs, Tensor others, Tensor slopes)",
    _topk_log_probs,
    _fake_log_probs,
)
_topk_log_probs_backward_op = define(
    "linear_topk_log_probs_backward",
    f"Tensor grad, {HEAD}, Tensor index, float? softcap, int chunk_bytes, bool[3] wanted",
    f"({GRADIENTS})",
    _topk_log_probs_backward,
    _fake_backward,
)


def _logits_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    hidden, weight, bias, index, *ctx.options = inputs
    ctx.save_for_backward(hidden, weight, bias, index)


def _logits_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    first_order_only("palu::linear_topk_logits")
    wanted = list(ctx.needs_input_grad[:3])
    gradients = _topk_logits_backward_op(grad, *ctx.saved_tensors, *ctx.options, wanted)
    return *(g if w else None for g, w in zip(gradients, wanted, strict=True)), None, None, None


_topk_logits_op.register_autograd(_logits_backward, setup_context=_logits_setup)


def _log_probs_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, index, ctx.softcap, ctx.frozen, ctx.chunk_bytes = inputs
    log_probs, others, slopes = output
    ctx.mark_non_differentiable(others, slopes)
    ctx.save_for_backward(hidden, weight, bias, index, log_probs, others, slopes)


def _log_probs_backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    first_order_only("palu::linear_topk_log_probs")
    hidden, weight, bias, index, log_probs, others, slopes = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:3])
    if ctx.frozen:
        times = group_sums(index, torch.ones_like(grad))
        g = grad - grad.sum(1, keepdim=True) * log_probs.exp() / times
        g = g if ctx.softcap is None else g * slopes
        gather = use_gather("auto", index.shape[0], index.shape[1], weight.shape[0], hidden.device.type)
        of_kept, *_ = _topk_logits_backward_op(g, hidden, weight, None, index, gather, ctx.chunk_bytes, wanted)
        of_hidden = of_kept.to(grad.dtype) - grad.sum(1, keepdim=True) * others.to(grad.dtype)
        return of_hidden.to(hidden.dtype), None, None, None, None, None, None
    options = ctx.softcap, ctx.chunk_bytes
    gradients = _topk_log_probs_backward_op(grad, hidden, weight, bias, index, *options, wanted)
    return *(g if w else None for g, w in zip(gradients, wanted, strict=True)), None, None, None, None


_topk_log_probs_op.register_autograd(_log_probs_backward, setup_context=_log_probs_setup)
