"""Losses from hidden states and a head, in chunks of rows, as torch ops: what `palu/ops/linear_losses.py` calls.

Each op forms the logits of a chunk of rows, takes from them what it needs and drops them: no logits outlive their
chunk. torch.compile sees an op as one node. The arguments were checked by the caller, but for values of an index.

The ops `*_fwd_bwd` form the gradient of the sum of all rows' losses in the forward pass. With G the gradient for the
logits Z = H W^T + b [r, V] of a chunk: dH = G W, dW += G^T H, db += sum_r G_r. With a cap c the losses get
c tanh(Z / c), and G is multiplied by 1 - tanh^2(Z / c) before the products. Where every row's loss is a result of its
own, its factor is not known before the backward pass, which then calls the same op again.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from palu.eager import acc_dtype, softcap_
from palu.ops.fused import GradientSum, cross_entropy_, kl_div_, scale_, softmax_, topk_kl_
from palu.ops.library import check_index_values, first_order_only

_ops = torch.ops.palu

Step = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(logits [r, V], row_weight [r], rows [r]) -> losses [r]; the logits become the gradient times row_weight."""


class _Gradients:
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


def _chunks(rows: Tensor, weight: Tensor, chunk_bytes: int, copies: int, capped: bool) -> tuple[Tensor, ...]:
    """Split rows so that the logits of a chunk, so many copies of them, take `chunk_bytes` at most, or are one row."""
    budget = chunk_bytes // max(weight.shape[0] * weight.element_size(), 1)
    if capped and weight.dtype != acc_dtype(weight.dtype):
        budget -= -(-budget // 8)  # for softcap_'s float32
    return rows.split(max(budget // copies, 1)) if len(rows) else ()


def _logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, *, slope: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Compute the logits [r, V] of a chunk, and the slope of the cap if there is one and it is asked for."""
    logits = F.linear(hidden, weight, bias)
    return logits, softcap_(logits, softcap, slope=slope) if softcap is not None else None


def _fwd_bwd(
    step: Step,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    row_weight: Tensor | None,
    softcap: float | None,
    chunk_bytes: int,
    wanted: Sequence[bool],
    *,
    references: int = 0,
) -> tuple[Tensor, ...]:
    """Losses of all rows whose weight is not 0, their weighted sum and its gradients.

    `references`: how many rows of other logits the step holds for each row.
    """
    acc = acc_dtype(hidden.dtype)
    if row_weight is None:
        row_weight = hidden.new_ones(len(hidden), dtype=acc)
        counted = torch.arange(len(hidden), device=hidden.device)
    else:
        counted = row_weight.nonzero()[:, 0]
    copies = 1 + references + (softcap is not None)
    chunks = _chunks(counted, weight, chunk_bytes, copies, softcap is not None or references > 0)
    losses = torch.zeros_like(row_weight, memory_format=torch.contiguous_format)
    gradients = _Gradients(hidden, weight, bias, wanted, len(chunks) > 1)
    for rows in chunks:
        h = hidden[rows]
        logits, slope = _logits(h, weight, bias, softcap, slope=any(wanted))
        losses.index_copy_(0, rows, step(logits, row_weight[rows], rows))
        if slope is not None:
            logits *= slope
        gradients.add(logits, h, rows)
        del logits, slope
    return (row_weight * losses).sum(), losses, *gradients.results()


# ---------------------------------------------------------------------------------------------------
# The ops


def _define(name: str, arguments: str, results: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Define the op palu::name. Nothing in its kernel is recorded, and the caller's autocast has no say in it."""

    def run(*args: Any) -> Any:
        with torch.no_grad(), torch.autocast(args[0].device.type, enabled=False):
            return kernel(*args)

    op = torch.library.custom_op(f"palu::{name}", run, mutates_args=(), schema=f"({arguments}) -> {results}")
    op.register_fake(fake)
    return op


_HEAD = "Tensor hidden, Tensor weight, Tensor? bias"
_ROWS = "Tensor? row_weight, bool per_row, float? softcap, int chunk_bytes, bool[3] wanted"
_GRADIENTS = "Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias"


def _fake_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    of_bias = bias if bias is not None and wanted[2] else None
    return (
        hidden.new_empty(hidden.shape if wanted[0] else 0),
        weight.new_empty(weight.shape if wanted[1] else 0),
        weight.new_empty(0 if of_bias is None else of_bias.shape),
    )


def _define_loss(name: str, own: str, kernel: Callable[..., tuple[Tensor, ...]]) -> None:
    """Define an op of _HEAD, its own arguments and _ROWS, with its autograd formula.

    `per_row` says which result has a gradient: the losses [R], or their sum, whose gradients are among the results.
    """

    def fake(hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
        losses = hidden.new_empty(hidden.shape[0], dtype=acc_dtype(hidden.dtype))
        return losses.new_empty(()), losses, *_fake_gradients(hidden, weight, bias, rest[-1])

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        total, losses, *gradients = output
        ctx.per_row = inputs[-4]
        ctx.mark_non_differentiable(total if ctx.per_row else losses, *gradients)
        ctx.inputs = [None if isinstance(value, Tensor) else value for value in inputs]
        ctx.places = [place for place, value in enumerate(inputs) if isinstance(value, Tensor)]
        ctx.save_for_backward(*([inputs[place] for place in ctx.places] if ctx.per_row else gradients))

    def backward(ctx: Any, grad_total: Tensor, grad_losses: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        first_order_only(f"palu::{name}")
        wanted = list(ctx.needs_input_grad[:3])
        if ctx.per_row:
            inputs = list(ctx.inputs)
            for place, tensor in zip(ctx.places, ctx.saved_tensors, strict=True):
                inputs[place] = tensor
            row_weight = inputs[-5]
            inputs[-5] = grad_losses if row_weight is None else torch.where(row_weight != 0, grad_losses, 0)
            _, _, *gradients = op(*inputs[:-1], wanted)
        else:
            gradients = [gradient.clone() for gradient in ctx.saved_tensors]
            for gradient in gradients:
                scale_(gradient, grad_total)
        own = [None] * (len(ctx.needs_input_grad) - 3)
        return *(g if w else None for g, w in zip(gradients, wanted, strict=True)), *own

    results = f"(Tensor total, Tensor losses, {_GRADIENTS})"
    op = _define(name, f"{_HEAD}, {own}, {_ROWS}", results, kernel, fake)
    op.register_autograd(backward, setup_context=setup)


def _topk_kl_fwd_bwd(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor,
    teacher_log_probs: Tensor,
    reverse: bool,
    bucket: bool,
    ignore_index: int,
    row_weight: Tensor | None,
    per_row: bool,
    *rest: Any,
) -> tuple[Tensor, ...]:
    def step(logits: Tensor, row_weight: Tensor, rows: Tensor) -> Tensor:
        return topk_kl_(logits, row_weight, index[rows], teacher_log_probs[rows], reverse, bucket, ignore_index)

    _check_teacher(index, teacher_log_probs, weight.shape[0], bucket, ignore_index)
    return _fwd_bwd(step, hidden, weight, bias, row_weight, *rest)


def _check_teacher(index: Tensor, log_probs: Tensor, vocab_size: int, bucket: bool, ignore_index: int) -> None:
    """Raise where the values of a teacher's top K cannot be meant; not on CUDA, where that would wait for the GPU."""
    op = "palu::linear_topk_kl"
    check_index_values(op, index, vocab_size, ignore_index)
    if index.device.type == "cuda" or index.numel() == 0:
        return
    there = index != ignore_index
    sums = log_probs.double().exp().masked_fill(~there, 0).sum(1)
    if len(bad := (~(sums <= 1.05)).nonzero()):
        row = int(bad[0])
        raise ValueError(
            f"{op}: the probabilities of teacher_log_probs[{row}] sum to {float(sums[row]):.4g}, and no distribution's "
            "do: give log-probabilities, neither logits nor probabilities"
        )
    if bucket:
        # What is not there gets a number of its own.
        places = torch.arange(index.shape[1], device=index.device)
        ordered = torch.where(there, index.long(), -1 - places).sort(1).values
        if len(bad := (ordered[:, 1:] == ordered[:, :-1]).nonzero()):
            row, k = bad[0].tolist()
            raise ValueError(
                f'{op}: index[{row}] has {int(ordered[row, k])} twice; tail = "bucket" needs distinct entries in a row'
            )


def _kl_fwd_bwd(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    ref_softcap: float | None,
    reverse: bool,
    row_weight: Tensor | None,
    per_row: bool,
    *rest: Any,
) -> tuple[Tensor, ...]:
    def step(logits: Tensor, row_weight: Tensor, rows: Tensor) -> Tensor:
        ref_logits, _ = _logits(ref_hidden[rows], ref_weight, ref_bias, ref_softcap)
        return kl_div_(logits, ref_logits.to(logits.dtype), row_weight, reverse)

    softcap, chunk_bytes, wanted = rest
    return _fwd_bwd(step, hidden, weight, bias, row_weight, softcap, chunk_bytes, wanted, references=1)


def _cross_entropy_fwd_bwd(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    row_weight: Tensor | None,
    per_row: bool,
    *rest: Any,
) -> tuple[Tensor, ...]:
    def step(logits: Tensor, row_weight: Tensor, rows: Tensor) -> Tensor:
        return cross_entropy_(logits, labels[rows], row_weight)

    check_index_values("palu::linear_cross_entropy", labels, weight.shape[0], ignore_index)
    return _fwd_bwd(step, hidden, weight, bias, row_weight, *rest)


_define_loss(
    "linear_topk_kl_fwd_bwd",
    "Tensor index, Tensor teacher_log_probs, bool reverse, bool bucket, int ignore_index",
    _topk_kl_fwd_bwd,
)
_define_loss(
    "linear_kl_fwd_bwd",
    "Tensor ref_hidden, Tensor ref_weight, Tensor? ref_bias, float? ref_softcap, bool reverse",
    _kl_fwd_bwd,
)
_define_loss("linear_cross_entropy_fwd_bwd", "Tensor labels, int ignore_index", _cross_entropy_fwd_bwd)


def _topk_log_probs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, softcap: float | None, chunk_bytes: int
) -> Tensor:
    check_index_values("palu::linear_topk_log_probs", index, weight.shape[0])
    acc = acc_dtype(hidden.dtype)
    result = hidden.new_empty(index.shape, dtype=acc)
    rows = torch.arange(len(hidden), device=hidden.device)
    for chunk in _chunks(rows, weight, chunk_bytes, 1, softcap is not None):
        logits, _ = _logits(hidden[chunk], weight, bias, softcap)
        kept = logits.gather(1, index[chunk].long()).to(acc)
        top, above = softmax_(logits, kept.new_ones(len(kept)))
        result.index_copy_(0, chunk, (kept - top[:, None]) - above[:, None])
        del logits
    return result


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
    # With g the gradient for log p at index: dz_v = sum_{k: index_k = v} g_k - p_v sum_k g_k.
    copies = 1 + (softcap is not None)
    rows = torch.arange(len(hidden), device=hidden.device)
    chunks = _chunks(rows, weight, chunk_bytes, copies, softcap is not None)
    gradients = _Gradients(hidden, weight, bias, wanted, len(chunks) > 1)
    for chunk in chunks:
        h, g = hidden[chunk], grad[chunk]
        logits, slope = _logits(h, weight, bias, softcap, slope=True)
        softmax_(logits, -g.sum(1))
        logits.scatter_add_(1, index[chunk].long(), g.to(logits.dtype))
        if slope is not None:
            logits *= slope
        gradients.add(logits, h, chunk)
        del logits, slope
    return gradients.results()


def _topk_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, gather: bool, chunk_bytes: int
) -> Tensor:
    if gather:  # the residual for the target 0 is the logit itself
        return _ops.linear_topk_mse(hidden, weight, index, bias, None, "constant", 0.0)[1]
    check_index_values("palu::linear_topk_logits", index, weight.shape[0])
    result = hidden.new_empty(index.shape, dtype=acc_dtype(hidden.dtype))
    rows = torch.arange(len(hidden), device=hidden.device)
    for chunk in _chunks(rows, weight, chunk_bytes, 1, False):
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
    chunks = _chunks(rows, weight, chunk_bytes, 1, False)
    gradients = _Gradients(hidden, weight, bias, wanted, len(chunks) > 1)
    for chunk in chunks:
        of_logits = weight.new_zeros(len(chunk), weight.shape[0])
        of_logits.scatter_add_(1, index[chunk].long(), grad[chunk].to(of_logits.dtype))
        gradients.add(of_logits, hidden[chunk], chunk)
        del of_logits
    return gradients.results()


def _define_topk(name: str, own: str, kernel: Callable[..., Tensor], kernel_backward: Callable[..., Any]) -> None:
    """Define an op of _HEAD, an index and options, that returns values [R, K], and its backward op."""

    def fake(hidden: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, *options: Any) -> Tensor:
        return hidden.new_empty(index.shape, dtype=acc_dtype(hidden.dtype))

    def fake_backward(_: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
        return _fake_gradients(hidden, weight, bias, rest[-1])

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        hidden, weight, bias, index, *ctx.options = inputs
        ctx.save_for_backward(hidden, weight, bias, index)

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        first_order_only(f"palu::{name}")
        wanted = list(ctx.needs_input_grad[:3])
        gradients = op_backward(grad, *ctx.saved_tensors, *ctx.options, wanted)
        own = [None] * (1 + len(ctx.options))
        return *(g if w else None for g, w in zip(gradients, wanted, strict=True)), *own

    arguments = f"{_HEAD}, Tensor index, {own}, int chunk_bytes"
    op = _define(name, arguments, "Tensor", kernel, fake)
    results = f"({_GRADIENTS})"
    op_backward = _define(
        f"{name}_backward", f"Tensor grad, {arguments}, bool[3] wanted", results, kernel_backward, fake_backward
    )
    op.register_autograd(backward, setup_context=setup)


_define_topk("linear_topk_log_probs", "float? softcap", _topk_log_probs, _topk_log_probs_backward)
_define_topk("linear_topk_logits", "bool gather", _topk_logits, _topk_logits_backward)
