"""Cases of `fused_linear_losses`, and the same by torch's own operations on all logits at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from palu import eager
from palu.losses import CrossEntropyTerm, KLTerm, LocalTerm, LocalUnlikelihoodTerm, Term, fused_linear_losses
from palu.models.head import Head

TARGETS = ["global_mean", "global_mean_detached", "local_mean", 0.5]


def assert_near(actual: Tensor | None, expected: Tensor | None, tolerance: float = 1e-9) -> None:
    """Largest difference relative to the largest expected value; zeros must be zeros."""
    assert (actual is None) == (expected is None)
    if actual is None or expected is None:
        return
    assert actual.shape == expected.shape
    if expected.numel():
        error, size = (actual.double() - expected.double()).abs().max(), expected.double().abs().max()
        assert error <= tolerance * size, f"{error:.2e} is more than {tolerance:.1e} of {size:.2e}"


@dataclass
class Case:
    """Arguments of fused_linear_losses; the head's weight and bias are leaves of their own."""

    hidden: Tensor
    head: Head
    terms: tuple[Term, ...]
    row_weight: Tensor
    impl: str = "auto"

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.hidden, self.head.weight, self.head.bias

    def row_bytes(self) -> int:
        return self.head.weight.shape[0] * self.head.weight.element_size()

    def to(self, dtype: torch.dtype) -> Case:
        """The same values in another dtype, as new leaves."""

        def cast(t: Tensor) -> Tensor:
            return t.detach().to(dtype, copy=True).requires_grad_(t.requires_grad)

        def cast_head(head: Head) -> Head:
            return head._replace(weight=cast(head.weight), bias=None if head.bias is None else cast(head.bias))

        terms = tuple(
            replace(term, hidden=cast(term.hidden), head=cast_head(term.head)) if isinstance(term, KLTerm) else term
            for term in self.terms
        )
        row_weight = self.row_weight.to(eager.acc_dtype(dtype))
        return replace(self, hidden=cast(self.hidden), head=cast_head(self.head), terms=terms, row_weight=row_weight)

    def losses(self, rows_per_chunk: int = 10**6, **options: Any) -> tuple[Tensor, Tensor]:
        """fused_linear_losses."""
        options = {"chunk_bytes": rows_per_chunk * self.row_bytes(), "impl": self.impl} | options
        return fused_linear_losses(self.hidden, self.head, self.terms, self.row_weight, **options)

    def run(self, rows_per_chunk: int = 10**6, factor: float = 1.0) -> tuple[Tensor, Tensor]:
        """fused_linear_losses, forward and backward."""
        total, losses = self.losses(rows_per_chunk)
        if total.requires_grad:
            (factor * total).backward()
        return total.detach(), losses


def make(
    device: torch.device,
    rows: Sequence[int] = (5, 6, 7),
    vocab: int = 29,
    hidden_size: int = 8,
    top_k: int = 6,
    *,
    target: str | float = "global_mean",
    reverse: bool = False,
    bias: bool = True,
    trainable: Sequence[bool] = (True, True, True),
    dtype: torch.dtype = torch.float64,
    impl: str = "auto",
    head: tuple[float, float | None] = (1.0, None),
    ref_head: tuple[float, float | None] = (1.0, None),
    floor: float = 0.0,
) -> Case:
    """Random values; `rows` are those of each term (local, KL, retain).

    `target`: of the local loss; "unlikelihood": that of a token among candidates. `trainable` speaks of hidden, weight
    and bias, `head` and `ref_head` of (scale, cap). A capped head has no gathered rows.
    """

    def values(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    local, kl, retain = rows
    reference = Head(values(vocab, hidden_size), values(vocab) if bias else None, *ref_head)
    # Not the reference's own: an index may name a logit twice, and the true token as a candidate.
    unlikelihood = target == "unlikelihood"
    index = torch.randint(vocab, (local, max(top_k, 1 + unlikelihood)), device=device, dtype=torch.int32)
    terms = (
        LocalUnlikelihoodTerm(index, floor) if unlikelihood else LocalTerm(index, target),
        KLTerm(values(kl, hidden_size), reference, reverse),
        CrossEntropyTerm(torch.randint(vocab, (retain,), device=device)),
    )
    case = Case(
        values(sum(rows), hidden_size),
        Head(values(vocab, hidden_size), values(vocab) if bias else None, *head),
        terms,
        torch.rand(sum(rows), device=device, dtype=eager.acc_dtype(dtype)),
        impl if head[1] is None else "auto",
    )
    for leaf, wanted in zip(case.leaves, trainable, strict=True):
        if leaf is not None:
            leaf.requires_grad_(wanted)
    return case


def textbook_logits(hidden: Tensor, head: Head) -> Tensor:
    """As transformers forms them: each operation rounds to the dtype."""
    logits = head.scale * F.linear(hidden, head.weight, head.bias)
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def textbook_losses(case: Case) -> Tensor:
    """Losses [R] with all logits at once, by torch's own operations."""
    losses = []
    sizes = [len(term) for term in case.terms]
    for logits, term in zip(textbook_logits(case.hidden, case.head).split(sizes), case.terms, strict=True):
        if isinstance(term, LocalTerm):
            losses.append(eager.topk_mse(logits, term.index, term.target))
        elif isinstance(term, LocalUnlikelihoodTerm):
            losses.append(eager.topk_unlikelihood(logits, term.index, term.floor))
        elif isinstance(term, KLTerm):
            log_p = logits.log_softmax(-1)
            log_q = textbook_logits(term.hidden, term.head).detach().log_softmax(-1)
            if term.reverse:
                losses.append((log_p.exp() * (log_p - log_q)).sum(-1))
            else:
                losses.append((log_q.exp() * (log_q - log_p)).sum(-1))
        else:
            losses.append(F.cross_entropy(logits, term.labels, reduction="none"))
    return torch.cat([loss.to(case.row_weight.dtype) for loss in losses])


def textbook(case: Case, rows_per_chunk: int = 10**6, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """Total and losses; the gradients of several chunks add up in the leaves, in their dtype."""
    losses = textbook_losses(case)
    for chunk in torch.arange(len(losses), device=losses.device).split(rows_per_chunk):
        part = factor * (case.row_weight[chunk] * losses[chunk]).sum()
        if part.requires_grad:
            part.backward(retain_graph=True)
    return (case.row_weight * losses).sum().detach(), losses.detach()
