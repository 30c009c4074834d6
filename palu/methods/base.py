"""What a method of unlearning declares, and the one module that DDP, FSDP and DeepSpeed see: batch in, loss out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from palu.data.packing import Batch, Items, Packed
from palu.data.tokenize import Example
from palu.eager import acc_dtype
from palu.losses import CrossEntropyTerm, Term, fused_linear_losses
from palu.models.head import Head, body_of, head_of
from palu.models.lora import CausalLM
from palu.models.root import ModelRoot
from palu.settings import RunSettings, Settings, count, not_negative

Role: TypeAlias = Literal["targets", "others", "retain"]  # of the rows of a batch
ROLES: tuple[Role, ...] = ("targets", "others", "retain")
FEWEST_STEPS = 48  # of a run that may end by itself: in later steps the KL brings back what the first ones took along


@dataclass(frozen=True)
class MethodSettings(Settings):
    """Settings that every method has.

    Attributes:
        gamma: weight of the loss on the forget set (PALU: of the local loss). A term of weight 0 is not computed, and
            stands as 0 in the history.
        lambda_retain: weight of the cross-entropy on the retain set.
        lora_rank: rank of the LoRA adapter that is trained in place of the weights, on every linear layer of the body,
            and merged into them at the end. ``None``: the weights themselves are trained. Of a ``peft.PeftModel`` its
            own adapter is.
    """

    gamma: float = not_negative(1.0)
    lambda_retain: float = not_negative(1.0)
    lora_rank: int | None = count(None, "all weights")

    def total_steps(self, steps_per_epoch: int) -> int:
        """Return the optimisation steps that a run takes, where its settings say nothing: 8 passes."""
        return 8 * steps_per_epoch

    @property
    def in_nats(self) -> bool:
        """Whether the forget loss is in nats, as log-probabilities are."""
        return True

    @property
    def ends_below(self) -> float | None:
        """The probability below which all targets must stay for a run to end by itself; None: it does not.

        Where there is one, the forget loss of a target is ``-log(1 - p)``, and p is that probability.
        """
        return None


class ForgetSet(NamedTuple):
    """The forget set, tokenised."""

    examples: Sequence[Example]
    eos_token_id: int | None = None
    alternates: Callable[[], Sequence[Example]] = list  # reads the second answer of each row


class RefField(NamedTuple):
    """One tensor that a method wants of the reference before training, with one entry per row of the items."""

    name: str
    rows: Literal["targets", "others"]  # which of an item's rows it has an entry for


class RefRows(NamedTuple):
    """Rows of any items, as the reference sees them."""

    targets: Tensor  # [a, d]: last hidden states of the target rows
    others: Tensor  # [b, d]: of the other rows
    target_labels: Tensor  # int64 [a]: the true tokens
    other_labels: Tensor  # int64 [b]


# Gives the reference fields by name, from rows and the reference's head. An entry must depend on its own row alone.
ReferenceFn: TypeAlias = Callable[[RefRows, Head], dict[str, Tensor]]


@dataclass(frozen=True)
class Reference:
    """What a run needs of the frozen reference, which runs once, before the first step."""

    fields: tuple[RefField, ...] = ()
    compute: ReferenceFn | None = None  # gives the fields; not called where there are none
    settings: dict[str, Any] = field(default_factory=dict)  # what the fields depend on: part of the cache's key
    head: bool = False  # whether the loss reads the reference's head
    anchors: int | None = 0  # how many everyday prompts it answers, to be kept; None: as many as the run can use
    neighbours: int = 0  # how many questions like each forget question it writes and answers, to be kept
    variants: int = 0  # from how many candidates for each span's first token it goes on, to find other ways to tell it


class Shares(NamedTuple):
    """One over each of the step's :class:`palu.data.packing.Counts` (over 1 where that is 0), scalars."""

    targets: Tensor
    others: Tensor
    retain: Tensor
    examples: Tensor


class RowTerm(NamedTuple):
    """A loss of each row of one role, averaged over these rows of the whole optimisation step."""

    rows: Role
    loss: Term


def retain_term(batch: Batch) -> RowTerm:
    """Return the token cross-entropy of the retain rows."""
    return RowTerm("retain", CrossEntropyTerm(batch.labels[len(batch.item) :]))


# (name in Method.terms, what it is, its weight). A tensor is a scalar with gradient, averaged already.
WeightedTerm: TypeAlias = tuple[str, RowTerm | Tensor, float]


class Losses(NamedTuple):
    """What a forward of a :class:`Method` returns; only ``total`` has a gradient."""

    total: Tensor  # the weighted sum of the terms
    terms: Tensor  # one figure per name in ``Method.terms``, divided by the counts given; 0 for one not computed
    of_targets: Tensor | None  # [targets]: -log(1 - p) of each true token; None where the settings have no ends_below


class Method(ModelRoot):
    """A method of unlearning: the rows it looks at, what it needs of the reference, and its losses.

    The model's logits are ``head_of(model).logits(body(...))``; ``config.method`` are the method's own settings.
    """

    Settings: ClassVar[type[MethodSettings]] = MethodSettings
    title: ClassVar[str]  # its name in reports
    terms: ClassVar[tuple[str, ...]] = ("forget", "retain")  # names of the figures in Losses.terms

    def __init__(self, model: CausalLM, config: RunSettings):
        super().__init__(model)
        self.config = config
        self.settings: Any = config.method
        # The frozen reference's, if ``reference(config).head``; to be set before the first forward. None: the model's
        # own, which is frozen and so the reference's, too.
        self.ref_head: Head | None = None
        self.weight_mean: Tensor | None = None  # of a frozen head, where a term reads it

    @staticmethod
    def make_items(forget: ForgetSet, config: RunSettings) -> Items:
        """Make the items of the forget set, with the rows that the method looks at."""
        raise NotImplementedError

    @staticmethod
    def reference(config: RunSettings) -> Reference:
        """Return what a run with these settings needs of the reference."""
        return Reference()

    def compute_losses(self, hidden: Tensor, head: Head, batch: Batch, shares: Shares) -> list[WeightedTerm]:
        """Return the terms of the loss from the hidden states [R, d] of the batch's rows, but for those of weight 0.

        All that are a :class:`RowTerm` share one pass over the head, a gathered one
        (:data:`palu.losses.GatheredTerm`) first.
        """
        raise NotImplementedError

    def hidden_states(self, packed: Packed) -> Tensor:
        """Run the body over a packed row; return the last states [T, d]."""
        return body_of(self.model)(**packed.inputs()).last_hidden_state[0]

    def forward(self, work: Batch | Callable[[], Any], *counts: Tensor) -> Any:
        """Compute :meth:`batch_losses`; or call a function, for :meth:`run`."""
        return self.batch_losses(work, *counts) if isinstance(work, Batch) else super().forward(work)

    def batch_losses(self, batch: Batch, counts: Tensor) -> Losses:
        """Compute the losses of a micro-batch on the model's device.

        ``counts``: int64 [4], the fields of :class:`palu.data.packing.Counts` summed over the whole optimisation step,
        by which the sums over this micro-batch are divided; a 0 counts as 1.
        """
        hidden, head = self.hidden_states(batch.packed).index_select(0, batch.rows), head_of(self.model)
        shares = Shares(*counts.clamp(min=1).to(acc_dtype(hidden.dtype)).reciprocal())
        terms = self.compute_losses(hidden, head, batch, shares)
        figures = dict.fromkeys(self.terms, shares.targets.new_zeros(()))
        of_rows = [(name, term, weight) for name, term, weight in terms if isinstance(term, RowTerm)]
        total, of_targets = self._row_losses(hidden, head, batch, shares, of_rows, figures)
        for name, term, weight in terms:
            if isinstance(term, Tensor):
                total, figures[name] = total + weight * term, term.detach()
        ends = self.settings.ends_below is not None
        return Losses(total, torch.stack(list(figures.values())), of_targets if ends else None)

    def _row_losses(
        self,
        hidden: Tensor,
        head: Head,
        batch: Batch,
        shares: Shares,
        terms: Sequence[tuple[str, RowTerm, float]],
        figures: dict[str, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Compute the weighted sum of the terms, and the losses of the first one; put the means into ``figures``."""
        if not terms:
            return hidden[:0].sum(dtype=shares.targets.dtype), shares.targets.new_zeros(0)
        parts = dict(zip(ROLES, hidden.split(list(batch.counts[:3])), strict=True))
        means = [getattr(shares, term.rows).expand(len(parts[term.rows])) for _, term, _ in terms]
        chosen = [term.rows for _, term, _ in terms if len(parts[term.rows])]
        total, losses = fused_linear_losses(
            hidden
            if chosen == [role for role in ROLES if len(parts[role])]
            else torch.cat([hidden[:0], *(parts[r] for r in chosen)]),
            head,
            tuple(term.loss for _, term, _ in terms),
            torch.cat([weight * mean for (_, _, weight), mean in zip(terms, means, strict=True)]),
            chunk_bytes=self.config.chunk_bytes,
            weight_mean=self.weight_mean,
        )
        of_terms = losses.split([len(mean) for mean in means])
        for (name, _, _), mean, of_term in zip(terms, means, of_terms, strict=True):
            figures[name] = (mean * of_term).sum()  # no product, which autocast would round
        return total, of_terms[0]
