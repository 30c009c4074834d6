"""The losses: PALU's textbook form on logits (arXiv 2601.03190), and the fused form on hidden states.

With ``z`` the current logits, ``P_theta`` their softmax and ``V_top`` the K indices that the frozen reference ranks
highest::

    L_local = mean over onset tokens of -log(1 - p), p = P_theta(token) renormalised over V_top and the token
                                        (1/K) * sum_{i in V_top} (z_i - c)^2       (the paper's)
    L_kl    = mean over ordinary tokens of KL(P_ref || P_theta)  ("forward") or KL(P_theta || P_ref) ("reverse")
    L_retain = mean token cross-entropy

:func:`palu_loss` takes full logits, has the paper's local loss and suits any trainer. :func:`fused_linear_losses` takes
the last hidden states of only those tokens that have a role, and never holds more logits than ``chunk_bytes``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from numbers import Integral
from typing import Any, NamedTuple, NoReturn, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from palu.data.tokenize import IGNORE, ORDINARY
from palu.eager import softcap_
from palu.models.head import GradientSum, Head, aligned_linear
from palu.ops import cross_entropy_, kl_div_, prefix_mask, topk_mse
from palu.ops.functional import checked_labels, has_frozen, needed_mean, split_target, use_gather
from palu.ops.library import check_tensors, first_order_only
from palu.settings import KL_DIRECTIONS

_ops = torch.ops.palu

# Of hidden [R, d], weight [V, d] and bias [V], to be added to; None: not asked for.
Grads: TypeAlias = tuple[Tensor | None, Tensor | None, Tensor | None]


class PaluLoss(NamedTuple):
    """Scalars with gradient; each is 0 where no token has its role."""

    local: Tensor
    kl: Tensor


def palu_loss(
    logits: Tensor,
    ref_logits: Tensor,
    labels: Tensor,
    *,
    n: int = 3,
    top_k: int = 5000,
    target: str | float = "global_mean",
    kl_direction: str = "reverse",
    eos_token_id: int | None = None,
) -> PaluLoss:
    """Compute the local entropy loss and the KL to the reference from full logits (arXiv 2601.03190, as published).

    Args:
        logits: [B, T, V], floating point, of the model in training; those at position t-1 predict the label at t.
        ref_logits: [B, T, V], same dtype, of the frozen reference.
        labels: [B, T], int64: -100 prompt or padding, -200 ordinary, a token id sensitive.
        n: onset length; -1: every sensitive token.
        top_k: K, clamped to V.
        target: see :class:`palu.UnlearnConfig`.
        kl_direction: ``"forward"`` or ``"reverse"``.
        eos_token_id: a sensitive label equal to it is dropped.

    Raises:
        ValueError, TypeError: shapes or devices that disagree, labels that are not int64, unknown choices.
        ValueError: a label that is neither a token id in [0, V) nor -100 nor -200 (on CUDA a device-side assertion).
    """
    check_tensors("palu_loss", logits=logits, ref_logits=ref_logits, labels=labels)
    if logits.dim() != 3 or logits.shape != ref_logits.shape or labels.shape != logits.shape[:2]:
        raise ValueError(
            "palu_loss needs logits and ref_logits [B, T, V] and labels [B, T], got "
            f"{list(logits.shape)}, {list(ref_logits.shape)} and {list(labels.shape)}"
        )
    if kl_direction not in KL_DIRECTIONS:
        raise ValueError(f"kl_direction = {kl_direction!r}: give one of {', '.join(KL_DIRECTIONS)}")
    if not isinstance(top_k, Integral) or top_k < 1:
        raise ValueError(f"top_k = {top_k}: give a positive integer")

    onset = prefix_mask(labels, n, eos_token_id)[:, 1:]
    labels = checked_labels(labels, logits.shape[-1], [IGNORE, ORDINARY])
    ordinary = labels[:, 1:] == ORDINARY
    current, frozen = logits[:, :-1], ref_logits[:, :-1].detach()

    index = frozen[onset].topk(min(top_k, logits.shape[-1]), dim=-1, sorted=False).indices
    local = _mean(topk_mse(current[onset], index, target))

    log_p, log_q = current[ordinary].log_softmax(-1), frozen[ordinary].log_softmax(-1)
    if kl_direction == "reverse":
        log_p, log_q = log_q, log_p
    return PaluLoss(local, _mean(F.kl_div(log_p, log_q, log_target=True, reduction="none").sum(-1)))


def _mean(values: Tensor) -> Tensor:
    """Return the mean, or 0 (still part of the graph) for an empty tensor."""
    return values.sum() / max(values.numel(), 1)


# Of every term, loss_and_grad_ returns the losses [r] of some of its rows; their logits [r, V] become the weighted
# gradient. gather returns the losses of all rows [R] from the head's rows in ``index`` alone, and adds the weighted
# gradients to ``grads``; ``mean`` [d] is ``head.weight.mean(0)``, or None: computed where it is needed.


@dataclass(frozen=True)
class LocalTerm:
    """Local entropy maximisation on onset rows (:func:`palu.topk_mse`); ``index``: the reference's top K."""

    index: Tensor  # [R, K] int32 or int64
    target: str | float

    def __len__(self) -> int:
        return self.index.shape[0]

    def loss_and_grad_(self, logits: Tensor, row_weight: Tensor, rows: slice) -> Tensor:
        name, constant = split_target(self.target)
        loss, slope = _ops.topk_mse(logits, self.index[rows], name, constant)
        _ops.topk_backward(row_weight, slope, self.index[rows], name == "global_mean", logits)
        return loss

    def gather(self, hidden: Tensor, head: Head, row_weight: Tensor, mean: Tensor | None, grads: Grads) -> Tensor:
        name, constant = split_target(self.target)
        mean = needed_mean(head.weight, mean, name)
        arguments = hidden, head.weight, self.index, head.bias, mean, name, constant
        grad_hidden, *grads_of_head = grads
        if grad_hidden is not None and grads_of_head == [None, None] and has_frozen(hidden, name):
            loss, gradient = _ops.linear_topk_mse_frozen(*arguments)
            grad_hidden += row_weight[:, None] * gradient
            return loss
        loss, slope = _ops.linear_topk_mse(*arguments)
        through_mean = name == "global_mean"
        _ops.linear_topk_backward(row_weight, slope, hidden, head.weight, self.index, mean, through_mean, *grads)
        return loss


@dataclass(frozen=True)
class LocalUnlikelihoodTerm:
    """Unlikelihood among candidates (:func:`palu.topk_unlikelihood`); ``index``: the true token, then these."""

    index: Tensor  # [R, K] int32 or int64
    floor: float

    def __len__(self) -> int:
        return self.index.shape[0]

    def loss_and_grad_(self, logits: Tensor, row_weight: Tensor, rows: slice) -> Tensor:
        loss, slope = _ops.topk_unlikelihood(logits, self.index[rows], self.floor)
        _ops.topk_backward(row_weight, slope, self.index[rows], False, logits)
        return loss

    def gather(self, hidden: Tensor, head: Head, row_weight: Tensor, mean: Tensor | None, grads: Grads) -> Tensor:
        loss, slope = _ops.linear_topk_unlikelihood(hidden, head.weight, self.index, head.bias, self.floor)
        _ops.linear_topk_backward(row_weight, slope, hidden, head.weight, self.index, None, False, *grads)
        return loss


@dataclass(frozen=True)
class KLTerm:
    """KL divergence to the reference on ``hidden.shape[0]`` ordinary rows."""

    hidden: Tensor  # [R, d]: the reference's last hidden states
    head: Head  # the reference's head
    reverse: bool
    lowered: Tensor | None = None  # [R] int64: tokens whose reference logit is lowered
    lowered_by: float = 0.0

    def __len__(self) -> int:
        return self.hidden.shape[0]

    def loss_and_grad_(self, logits: Tensor, row_weight: Tensor, rows: slice) -> Tensor:
        ref_logits = self.head.product(self.hidden[rows], aligned_linear).to(logits.dtype)
        if self.head.softcap is not None:
            softcap_(ref_logits, self.head.softcap)
        if self.lowered is not None:
            label = self.lowered[rows, None]
            ref_logits.scatter_add_(1, label, ref_logits.new_full(label.shape, -self.lowered_by))
        return kl_div_(logits, ref_logits, row_weight, self.reverse)


@dataclass(frozen=True)
class CrossEntropyTerm:
    """Token cross-entropy on ``labels.shape[0]`` retain rows."""

    labels: Tensor  # [R] int64

    def __len__(self) -> int:
        return self.labels.shape[0]

    def loss_and_grad_(self, logits: Tensor, row_weight: Tensor, rows: slice) -> Tensor:
        return cross_entropy_(logits, self.labels[rows], row_weight)


GatheredTerm: TypeAlias = LocalTerm | LocalUnlikelihoodTerm  # they read the logits in ``index`` alone
Term: TypeAlias = GatheredTerm | KLTerm | CrossEntropyTerm


def fused_linear_losses(
    hidden: Tensor,
    head: Head,
    terms: tuple[Term, ...],
    row_weight: Tensor,
    *,
    chunk_bytes: int,
    weight_mean: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Compute the weighted sum of the losses of all rows, from hidden states, in chunks of rows.

    The gradient is formed in the forward pass (only first derivatives exist, and one backward pass per forward), so no
    logits outlive their chunk, and all terms share one gradient of the head. In bfloat16 or float16 that is added up in
    float32 over the chunks, if there are several, and rounded once at the end. Until then this takes 4 bytes more for
    each element of weight and bias: 2.1 GB for [128256, 4096]. Where all rows at once take no more than that beside
    ``chunk_bytes``, they are one chunk instead.

    Args:
        hidden: [R, d], the last hidden states of the rows of all terms, one term after the other.
        head: weight [V, d] and bias [V] or None, same dtype as ``hidden`` (autocast is honoured); scale and cap.
        terms: what each row is judged by; their lengths add up to R.
        row_weight: [R], float32 (float64 for float64 ``hidden``): the factor of each row's loss in the sum.
        chunk_bytes: bound on the logits held at once, those of the reference and a cap's slopes included; see above
            for the head's gradient.
        weight_mean: [d], ``head.weight.mean(0)``, if it is known.
        impl: how the rows of a GatheredTerm, which comes first, get their logits; see
            :func:`palu.ops.linear_topk_mse`. All rows of a capped head take the dense product, since the mean over the
            vocabulary depends on every logit there: ValueError for "gather".

    Returns:
        (total, losses): the scalar ``(row_weight * losses).sum()`` with gradient for hidden, weight
        and bias, and the losses [R] themselves, without gradient.
    """
    if torch._C._are_functorch_transforms_active():  # torch's own error would ask for another forward pass
        _reverse_mode_only()
    if head.softcap is not None:
        if impl == "gather":
            raise ValueError('impl = "gather" needs logits that are not capped; give "auto" or "dense"')
        if impl == "auto":
            impl = "dense"
    return _FusedLinearLosses.apply(
        hidden, head.weight, head.bias, row_weight, terms, chunk_bytes, weight_mean, impl, head.scale, head.softcap
    )


def _reverse_mode_only() -> NoReturn:
    raise RuntimeError(
        "fused_linear_losses has first derivatives in reverse mode only, and no torch.func transforms; "
        "use the plain-torch twins in palu.eager"
    )


class _FusedLinearLosses(torch.autograd.Function):
    # Per chunk, with G the weighted gradient of the losses for the logits Z = H W^T + b [r, V]:
    #   dH = G W,   dW += G^T H,   db += sum_r G_r.
    # A scale s is in H and b from the start (Head.scaled), so dH and db are multiplied by it at the end. With a cap c
    # the losses get c tanh(Z / c), and G is multiplied by 1 - tanh^2(Z / c) before the products.
    # A GatheredTerm comes first among the terms; where gathering is faster its rows skip the chunks.

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        row_weight: Tensor,
        terms: tuple[Term, ...],
        chunk_bytes: int,
        weight_mean: Tensor | None,
        impl: str,
        scale: float,
        softcap: float | None,
    ) -> tuple[Tensor, Tensor]:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        ctx.dtypes = hidden.dtype, weight.dtype, bias.dtype if bias is not None else None
        ctx.factors = scale, 1.0, scale
        with torch.autocast(device, enabled=False):
            scaled = Head(weight, bias, scale).scaled
            h, w, b = scaled(hidden).to(dtype), weight.to(dtype), None if bias is None else scaled(bias).to(dtype)
            losses = row_weight.new_empty(len(h))
            need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
            grad_h = h.new_empty(h.shape) if need_hidden else None

            local, gathered = terms[0] if terms else None, 0
            if isinstance(local, GatheredTerm):
                onset = len(local)
                if use_gather(impl, local.index, w, beside_dense=len(h) > onset, trained=need_weight or need_bias):
                    gathered = onset

            caps = [softcap, *(term.head.softcap for term in terms if isinstance(term, KLTerm))]
            row_bytes, halves = w.shape[0] * w.element_size(), dtype != row_weight.dtype
            eighths = 7 if halves and any(caps) else 8  # the rest is softcap_'s float32
            budget, copies = chunk_bytes // row_bytes * eighths // 8, 1 if softcap is None else 2
            if halves and need_weight and not gathered:  # one chunk saves the float32 sum, and may take its room
                whole = sum(len(term) * (copies + isinstance(term, KLTerm)) for term in terms)
                if whole <= (chunk_bytes + 4 * w.numel()) // row_bytes * eighths // 8:
                    budget = max(budget, whole)
            chunks = list(_chunks(terms, gathered, budget, copies))
            several = len(chunks) + (gathered > 0) > 1
            sum_w = GradientSum(w, several) if need_weight else None
            sum_b = GradientSum(b, several) if b is not None and need_bias else None
            for rows, parts in chunks:
                logits = aligned_linear(h[rows], w, b)
                slope = softcap_(logits, softcap, slope=True) if softcap is not None else None
                for term, of_hidden, of_term in parts:
                    of_chunk = slice(of_hidden.start - rows.start, of_hidden.stop - rows.start)
                    losses[of_hidden] = term.loss_and_grad_(logits[of_chunk], row_weight[of_hidden], of_term)
                if slope is not None:
                    logits *= slope
                if grad_h is not None:
                    torch.mm(logits, w, out=grad_h[rows])
                if sum_w is not None:
                    sum_w.add_product(logits.t(), h[rows])
                if sum_b is not None:
                    sum_b.buffer().add_(logits.sum(0))
                del logits, slope
            if isinstance(local, GatheredTerm) and gathered:
                grads = (
                    None if grad_h is None else grad_h[:gathered].zero_(),
                    None if sum_w is None else sum_w.buffer(),
                    None if sum_b is None else sum_b.buffer(),
                )
                losses[:gathered] = local.gather(h[:gathered], Head(w, b), row_weight[:gathered], weight_mean, grads)
        of_head = zip((sum_w, sum_b), ctx.dtypes[1:], strict=True)
        ctx.grads = [grad_h, *(None if of is None else of.result(dtype) for of, dtype in of_head)]
        ctx.mark_non_differentiable(losses)
        return (row_weight * losses).sum(), losses

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> NoReturn:
        _reverse_mode_only()

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        first_order_only("fused_linear_losses", "the plain-torch twins in palu.eager")
        if ctx.grads is None:
            raise RuntimeError(
                "the gradients of fused_linear_losses were already used: call it again for another backward pass"
            )
        grads, ctx.grads = ctx.grads, None
        for i, (dtype, factor) in enumerate(zip(ctx.dtypes, ctx.factors, strict=True)):
            if grads[i] is not None:
                _scale_(grads[i], grad_total if factor == 1 else grad_total * factor)
                grads[i] = grads[i].to(dtype)
        return (*grads, *[None] * 7)


def _scale_(gradient: Tensor, factor: Tensor) -> None:
    if factor.device.type != "cpu":  # one that is 1, too: to ask would be to wait for the GPU
        gradient.view(-1).mul_(factor.view(1))  # of one dimension: a scalar would be rounded to gradient's dtype first
    elif factor != 1:
        gradient.mul_(factor.item())


Part = tuple[Term, slice, slice]  # (term, its rows of ``hidden``, which of the term's rows these are)


def _chunks(terms: tuple[Term, ...], start: int, budget: int, copies: int) -> Iterator[tuple[slice, list[Part]]]:
    """Yield rows of ``hidden`` from ``start`` on, and the parts of the terms that lie in them.

    Chunks hold ``budget`` rows of logits at most, or one row. A row counts ``copies`` times, and once more where it
    has reference logits.
    """
    rows, cost, offset = start, 0, 0
    parts: list[Part] = []
    for term in terms:
        price = copies + isinstance(term, KLTerm)
        row = max(start - offset, 0)
        while row < len(term):
            take = min(len(term) - row, max((budget - cost) // price, 0 if parts else 1))
            if take == 0:
                yield slice(rows, offset + row), parts
                rows, parts, cost = offset + row, [], 0
                continue
            parts.append((term, slice(offset + row, offset + row + take), slice(row, row + take)))
            row += take
            cost += take * price
        offset += len(term)
    if parts:
        yield slice(rows, offset), parts
