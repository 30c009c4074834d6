"""The ops of `linear_topk_kl`, `linear_kl` and `linear_cross_entropy`.

They form the gradient of the sum of all rows' losses in the forward pass. Where every row's loss is a result of its
own, its factor is not known before the backward pass, which then calls the same op again.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from palu.eager import acc_dtype
from palu.ops.chunks import GRADIENTS, HEAD, Gradients, chunk_logits, define, fake_gradients, split_rows
from palu.ops.fused import cross_entropy_, kl_div_, scale_, topk_kl_
from palu.ops.library import check_index_values, first_order_only

_ROWS = "Tensor? row_weight, bool per_row, float? softcap, int chunk_bytes, bool[3] wanted"

Step = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(logits [r, V], row_weight [r], rows [r]) -> losses [r]; the logits become the gradient times row_weight."""


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
    chunks = split_rows(counted, weight, chunk_bytes, copies, softcap is not None or references > 0)
    losses = torch.zeros_like(row_weight, memory_format=torch.contiguous_format)
    gradients = Gradients(hidden, weight, bias, wanted, len(chunks) > 1)
    for rows in chunks:
        h = hidden[rows]
        logits, slope = chunk_logits(h, weight, bias, softcap, slope=any(wanted))
        losses.index_copy_(0, rows, step(logits, row_weight[rows], rows))
        if slope is not None:
            logits *= slope
        gradients.add(logits, h, rows)
        del logits, slope
    return (row_weight * losses).sum(), losses, *gradients.results()


def _define_loss(name: str, own: str, kernel: Callable[..., tuple[Tensor, ...]]) -> None:
    """Define an op of HEAD, its own arguments and _ROWS, with its autograd formula.

    `per_row` says which result has a gradient: the losses [R], or their sum, whose gradients are among the results.
    """

    def fake(hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
        losses = hidden.new_empty(hidden.shape[0], dtype=acc_dtype(hidden.dtype))
        return losses.new_empty(()), losses, *fake_gradients(hidden, weight, bias, rest[-1])

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

    results = f"(Tensor total, Tensor losses, {GRADIENTS})"
    op = define(name, f"{HEAD}, {own}, {_ROWS}", results, kernel, fake)
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

    _check_teacher(index, teacher_log_probs, weight.shape[0], ignore_index)
    return _fwd_bwd(step, hidden, weight, bias, row_weight, *rest)


def _check_teacher(index: Tensor, log_probs: Tensor, vocab_size: int, ignore_index: int) -> None:
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
    # What is not there gets a number of its own.
    places = torch.arange(index.shape[1], device=index.device)
    ordered = torch.where(there, index.long(), -1 - places).sort(1).values
    if len(bad := (ordered[:, 1:] == ordered[:, :-1]).nonzero()):
        row, k = bad[0].tolist()
        raise ValueError(f"{op}: index[{row}] has {int(ordered[row, k])} twice; give distinct entries in a row")


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
        ref_logits, _ = chunk_logits(ref_hidden[rows], ref_weight, ref_bias, ref_softcap)
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
