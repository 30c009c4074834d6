"""General ops on hidden states and a head, without logits [R, V]: chosen logits and log-probabilities, and losses.

All take `hidden` [..., d] with any leading dimensions; below R is their product. The logits are

    z = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap),    or without the cap where it is None.

They are formed in chunks of rows (`palu/ops/chunks.py`). Under autocast they are computed in its dtype.
"""

from typing import Any

import torch
from torch import Tensor

from palu.eager import acc_dtype
from palu.ops import loss_ops as _loss_ops  # noqa: F401  (defines ops)
from palu.ops import topk_ops as _topk_ops  # noqa: F401  (defines ops)
from palu.ops.arguments import (
    cap,
    check_choice,
    check_ignore_index,
    check_labels,
    check_shape,
    dtype_name,
    flat_head,
    flat_index,
)
from palu.ops.functional import use_gather
from palu.ops.library import check_tensors
from palu.settings import KL_DIRECTIONS

_ops = torch.ops.palu

CHUNK_BYTES = 256 * 2**20
REDUCTIONS = ("mean", "sum", "none")
TAILS = ("ignore", "bucket")


def linear_topk_logits(
    hidden: Tensor,
    weight: Tensor,
    index: Tensor,
    bias: Tensor | None = None,
    *,
    softcap: float | None = None,
    scale: float = 1.0,
    impl: str = "auto",
    chunk_bytes: int = CHUNK_BYTES,
) -> Tensor:
    """Compute chosen logits: `z[r, index[r, k]]`.

    Args:
        hidden: [..., d] float32, float64, bfloat16, or (not on a CPU) float16.
        weight: [V, d], the dtype of `hidden`.
        index: [..., K] int32 or int64, each in [0, V); one may occur twice.
        bias: [V], the dtype of `hidden`.
        softcap: the cap c of `c tanh(z / c)` (Gemma 2), or None.
        scale: what the logits are multiplied by before the cap, for instance 1 / temperature.
        impl: "gather" reads the K rows of `weight` that each row needs; "dense" forms the logits of a chunk of rows;
            "auto" takes the faster one (`palu.ops.functional.use_gather`).
        chunk_bytes: bound on the logits that "dense" holds at once.

    Returns:
        [..., K], float64 for float64 inputs and float32 otherwise; differentiable once, in hidden, weight and bias.

    Memory: "gather" needs the gradients, and a copy of the index. "dense" needs `chunk_bytes` more.

    Raises:
        TypeError: a dtype not listed above, or different dtypes.
        ValueError: shapes that do not fit, K = 0, V = 0, different devices, an unknown `impl`, a scale or cap that is
            no positive number.
        IndexError: an index out of range (CPU; on CUDA a device-side assertion).
    """
    who = "palu::linear_topk_logits"
    h, w, b, rows = flat_head(who, hidden, weight, bias, scale, softcap, chunk_bytes, {"index": index})
    i = flat_index(who, index, rows, weight)
    gather = use_gather(impl, i.shape[0], i.shape[1], weight.shape[0], hidden.device.type)
    logits = _ops.linear_topk_logits(h, w, b, i, gather, chunk_bytes)
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    return logits.unflatten(0, rows)


def linear_topk_log_probs(
    hidden: Tensor,
    weight: Tensor,
    index: Tensor,
    bias: Tensor | None = None,
    *,
    softcap: float | None = None,
    scale: float = 1.0,
    chunk_bytes: int = CHUNK_BYTES,
) -> Tensor:
    """Compute log-probabilities of chosen vocabulary entries: `log softmax(z[r])[index[r, k]]`, over all V entries.

        dL/dz[r, v] = sum_{k: index[r, k] = v} g[r, k] - softmax(z[r])[v] sum_k g[r, k],    g = dL/dlog_probs

    Args:
        hidden, weight, index, bias, softcap, scale: as in `linear_topk_logits`.
        chunk_bytes: bound on the logits held at once, in bytes.

    Returns:
        [..., K], float64 for float64 inputs and float32 otherwise; differentiable once, in hidden, weight and bias.

    Memory: the result, the gradients and one chunk of logits (with a cap its slope, too; on a CPU the softmax of a
    bfloat16 chunk is computed in float32 beside it). Nothing of size [R, V] is kept for the backward pass. Where
    weight or bias require grad, it computes the logits again: one matrix product more than with all logits in memory.
    A frozen head needs none, but [R, d] from the forward pass. For a KL `linear_topk_kl` does without either.

    Raises:
        As `linear_topk_logits`.
    """
    who = "palu::linear_topk_log_probs"
    h, w, b, rows = flat_head(who, hidden, weight, bias, scale, softcap, chunk_bytes, {"index": index})
    i = flat_index(who, index, rows, weight)
    frozen = (
        torch.is_grad_enabled() and h.requires_grad and not w.requires_grad and not (b is not None and b.requires_grad)
    )
    return _ops.linear_topk_log_probs(h, w, b, i, cap(softcap), frozen, chunk_bytes)[0].unflatten(0, rows)


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
    chunk_bytes: int = CHUNK_BYTES,
) -> Tensor:
    """Compute the KL divergence between a teacher, known by its top K, and the model: distillation from a cache.

    With q_k = exp(teacher_log_probs[r, k]), p = softmax(z[r]) over all V entries and p_k = p[index[r, k]]:

        forward   sum_k q_k (log q_k - log p_k)        teacher first: the model covers what the teacher does
        reverse   sum_k p_k (log p_k - log q_k)        model first

    `tail="ignore"` takes these sums as they are. They are no divergence then: they can be negative. `tail="bucket"`
    adds the same term for q_rest = 1 - sum_k q_k and p_rest = 1 - sum_k p_k, all other entries as one. That is the
    divergence between two distributions over K + 1 events: at least 0, and 0 where both agree. Its gradient is finite,
    however small the rest is. q_rest is known to the precision of `teacher_log_probs`: cache them in float32. For
    "reverse" it counts as no less than the resolution of float32 (or float64), since log q_rest is needed.

    Args:
        hidden, weight, bias, softcap, scale: as in `linear_topk_logits`.
        index: [..., K] int32 or int64, distinct within a row, each in [0, V), or `ignore_index` for an entry that is
            not there.
        teacher_log_probs: [..., K] floating point, natural logarithms, over the teacher's whole vocabulary; -inf where
            the teacher gives no probability (in "reverse" the loss is infinite then). They get no gradient.
        direction: "forward" or "reverse".
        tail: "ignore" or "bucket".
        ignore_index: what marks entries that are not there. A row of nothing else is ignored.
        reduction: "mean" over the rows that are not ignored (0 if all are), "sum", or "none".
        chunk_bytes: bound on the logits held at once, in bytes.

    Returns:
        A scalar, or for "none" [...] with 0 for ignored rows; float64 for float64 inputs and float32 otherwise.
        Differentiable once, in hidden, weight and bias.

    Memory: the gradients and one chunk of logits (with a cap its slope, too; on a CPU the softmax of a bfloat16 chunk
    is computed in float32 beside it). The gradient is formed in the forward pass, for "none" in the backward pass,
    where the logits are computed again. Ignored rows cost nothing; to find them waits for the GPU.

    Raises:
        TypeError, ValueError: as `linear_topk_logits`; an unknown direction, tail or reduction.
        ValueError: an `ignore_index` that is no integer, or that the dtype of `index` does not hold.
        ValueError: not on CUDA: probabilities of a row that sum to more than 1.05; entries that are not distinct.
        IndexError: an index out of range (CPU; on CUDA a device-side assertion).
    """
    who = "palu::linear_topk_kl"
    given = {"index": index, "teacher_log_probs": teacher_log_probs}
    h, w, b, rows = flat_head(who, hidden, weight, bias, scale, softcap, chunk_bytes, given)
    i = flat_index(who, index, rows, weight)
    if not teacher_log_probs.is_floating_point():
        raise TypeError(f"{who}: teacher_log_probs must be floating point, got {dtype_name(teacher_log_probs.dtype)}")
    check_shape(who, "teacher_log_probs", teacher_log_probs, index.shape)
    check_choice(who, "direction", direction, KL_DIRECTIONS)
    check_choice(who, "tail", tail, TAILS)
    check_ignore_index(who, ignore_index, index.dtype)
    counts = (i != ignore_index).any(1)
    log_q = teacher_log_probs.detach().flatten(0, -2)
    own = i, log_q, direction == "reverse", tail == "bucket", ignore_index
    op = _ops.linear_topk_kl_fwd_bwd
    return _reduced(who, op, (h, w, b), own, counts, rows, reduction, softcap, chunk_bytes)


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
    chunk_bytes: int = CHUNK_BYTES,
) -> Tensor:
    """Compute the KL divergence between a frozen reference (or a teacher) and the model, over the whole vocabulary.

    With P = softmax(z[r]) of the model and Q = softmax(z'[r]) of the reference:

        forward   KL(Q || P) = sum_v Q_v (log Q_v - log P_v)        dz = P - Q
        reverse   KL(P || Q)                                        dz = P (log P - log Q - KL)

    Args:
        hidden, weight, bias, softcap, scale: as in `linear_topk_logits`.
        ref_hidden: [..., d'], with the leading dimensions of `hidden`, floating point.
        ref_weight: [V, d'], the dtype of `ref_hidden`.
        ref_bias: [V], the dtype of `ref_hidden`. None of the reference's tensors gets a gradient.
        labels: [...] int64, which say no more than which rows are ignored, or None: no row is.
        direction: "forward" or "reverse".
        ignore_index: the label of a row that is ignored.
        reduction: "mean" over the rows that are not ignored (0 if all are), "sum", or "none".
        ref_softcap, ref_scale: those of the reference's head: give them, too, where both models have them.
        chunk_bytes: bound on the logits held at once, the reference's included, in bytes.

    Returns:
        A scalar, or for "none" [...] with 0 for ignored rows; float64 for float64 inputs and float32 otherwise.
        Differentiable once, in hidden, weight and bias.

    Memory: the gradients and one chunk of both models' logits (on a CPU with float32 copies of bfloat16 ones). The
    gradient is formed in the forward pass, for "none" in the backward pass, where the logits are computed again.

    Raises:
        TypeError, ValueError: as `linear_topk_logits`; an unknown direction or reduction.
        ValueError: an `ignore_index` that is no integer of 64 bits.
    """
    who = "palu::linear_kl"
    given = {"ref_hidden": ref_hidden} | ({"labels": labels} if labels is not None else {})
    h, w, b, rows = flat_head(who, hidden, weight, bias, scale, softcap, chunk_bytes, given)
    with torch.no_grad():
        ref_h, ref_w, ref_b, ref_rows = flat_head(
            who, ref_hidden, ref_weight, ref_bias, ref_scale, ref_softcap, chunk_bytes, {}, "ref_"
        )
    if ref_rows != rows:
        told = f"{list(rows)} and {list(ref_rows)}"
        raise ValueError(f"{who}: hidden and ref_hidden must have the same leading dimensions, got {told}")
    if ref_weight.shape[0] != weight.shape[0]:
        told = f"{weight.shape[0]} and {ref_weight.shape[0]}"
        raise ValueError(f"{who}: weight and ref_weight must have the same vocabulary, got {told} rows")
    check_choice(who, "direction", direction, KL_DIRECTIONS)
    check_ignore_index(who, ignore_index, torch.int64)
    counts = None
    if labels is not None:
        check_labels(who, labels, rows)
        counts = labels.flatten() != ignore_index
    reference = ref_h.detach(), ref_w.detach(), None if ref_b is None else ref_b.detach()
    own = *reference, cap(ref_softcap), direction == "reverse"
    op = _ops.linear_kl_fwd_bwd
    return _reduced(who, op, (h, w, b), own, counts, rows, reduction, softcap, chunk_bytes)


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
    chunk_bytes: int = CHUNK_BYTES,
) -> Tensor:
    """Compute the token cross-entropy `logsumexp(z[r]) - z[r, labels[r]]`.

        dz[r, v] = softmax(z[r])[v] - [v = labels[r]]

    Args:
        hidden, weight, bias, softcap, scale: as in `linear_topk_logits`.
        labels: [...] int64, each in [0, V) or `ignore_index`.
        shift: hidden states at t-1 predict the label at t, in the last leading dimension: the last hidden state and
            the first label of each sequence are left out.
        ignore_index: the label of a row that is ignored.
        reduction: "mean" over the rows that are not ignored (0 if all are; torch gives NaN), "sum", or "none".
        chunk_bytes: bound on the logits held at once, in bytes.

    Returns:
        A scalar, or for "none" the shape of the labels (where they are shifted, one shorter) with 0 for ignored rows;
        float64 for float64 inputs and float32 otherwise. Differentiable once, in hidden, weight and bias.

    Memory: as `linear_topk_kl`. Ignored rows cost nothing; to find them waits for the GPU.

    Raises:
        TypeError, ValueError: as `linear_topk_logits`; an unknown reduction.
        ValueError: an `ignore_index` that is no integer of 64 bits.
        IndexError: a label out of range (CPU; on CUDA a device-side assertion).
    """
    who = "palu::linear_cross_entropy"
    check_tensors(who, hidden=hidden, weight=weight, labels=labels)
    check_labels(who, labels, hidden.shape[:-1])
    check_ignore_index(who, ignore_index, labels.dtype)
    if shift:
        hidden, labels = hidden[..., :-1, :], labels[..., 1:]
    h, w, b, rows = flat_head(who, hidden, weight, bias, scale, softcap, chunk_bytes, {})
    flat = labels.flatten()
    counts = flat != ignore_index
    op = _ops.linear_cross_entropy_fwd_bwd
    return _reduced(who, op, (h, w, b), (flat, ignore_index), counts, rows, reduction, softcap, chunk_bytes)


def _reduced(
    who: str,
    op: Any,
    head: tuple[Tensor, Tensor, Tensor | None],
    own: tuple[Any, ...],
    counts: Tensor | None,
    rows: torch.Size,
    reduction: str,
    softcap: float | None,
    chunk_bytes: int,
) -> Tensor:
    """Call one of the ops `*_fwd_bwd` and reduce its result; `counts` [R] says which rows are not ignored."""
    check_choice(who, "reduction", reduction, REDUCTIONS)
    per_row = reduction == "none"
    training = torch.is_grad_enabled() and not per_row
    wanted = [training and t is not None and t.requires_grad for t in head]
    row_weight = None if counts is None else counts.to(acc_dtype(head[0].dtype))
    total, losses, *_ = op(*head, *own, row_weight, per_row, cap(softcap), chunk_bytes, wanted)
    if per_row:
        return losses.unflatten(0, rows)
    if reduction == "sum":
        return total
    return total / (max(rows.numel(), 1) if counts is None else counts.sum().clamp(min=1))
