"""What a method of unlearning declares, and the one module that DDP, FSDP and DeepSpeed see: batch in, loss out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from palu.config import UnlearnConfig
from palu.data.packing import Batch, Items, Packed
from palu.data.tokenize import Example
from palu.eager import acc_dtype
from palu.models.head import Head, body_of, head_of, map_logits, nll
from palu.models.lora import CausalLM
from palu.models.root import ModelRoot


class RefField(NamedTuple):
    """One tensor that a method wants of the reference before training, with one entry per row of the items."""

    name: str
    rows: Literal["targets", "others"]  # which of an item's rows it has an entry for


class RefRows(NamedTuple):
    """Rows of any items, as the reference sees them."""

    targets: Tensor  # [a, d]: hidden states of the target rows, those of Method.hidden_states
    others: Tensor  # [b, d]: of the other rows
    target_labels: Tensor  # int64 [a]: the true tokens
    other_labels: Tensor  # int64 [b]


# Gives the reference fields by name. An entry must depend on its own row alone.
ReferenceFn: TypeAlias = Callable[[RefRows], dict[str, Tensor]]


class Shares(NamedTuple):
    """One over each of the step's :class:`palu.data.packing.Counts` (over 1 where that is 0), scalars."""

    targets: Tensor
    others: Tensor
    retain: Tensor
    examples: Tensor


class Losses(NamedTuple):
    """What a forward of a :class:`Method` returns; only ``total`` has a gradient."""

    total: Tensor  # the weighted sum of the terms
    terms: Tensor  # one figure per name in ``Method.terms``, divided by the counts given; 0 for a term of weight 0
    highest_probability: Tensor  # of a true token at a target row; NaN when not asked for


class Method(ModelRoot):
    """A method of unlearning: which rows it looks at, what it wants of the reference, and its loss.

    Args:
        model: a causal language model whose logits are ``head_of(model).logits(body(...))``.
        config: the settings; ``stop_probability`` decides whether probabilities are computed.

    Attributes:
        ref_head: the frozen reference's head, if ``needs_ref_head``; to be set before the first forward. ``None``: the
            model's own, which is frozen and so the reference's, too.
    """

    terms: ClassVar[tuple[str, ...]]  # names of the figures in Losses.terms
    ref_fields: ClassVar[tuple[RefField, ...]] = ()  # what it wants of the reference, where all terms have a weight
    needs_ref_head: ClassVar[bool] = False  # whether the loss reads the reference's head, where its term has a weight
    needs_alternates: ClassVar[bool] = False  # whether forget rows must have a second answer to prefer
    has_kl: ClassVar[bool] = False  # whether a KL keeps the other rows, so that anchors may be among them
    asks_of_retain: ClassVar[bool] = False  # whether the reference is asked about the retain items, too, as others
    reaches_all: ClassVar[bool] = True  # whether its loss depends on all weights of the body and the head

    def __init__(self, model: CausalLM, config: UnlearnConfig):
        super().__init__(model)
        self.config = config
        self.ref_head: Head | None = None

    @staticmethod
    def check(model: CausalLM, config: UnlearnConfig) -> None:
        """Raise ValueError where the method cannot train the model with these settings."""

    @staticmethod
    def make_items(
        examples: Sequence[Example], alternates: Sequence[Example], config: UnlearnConfig, eos_token_id: int | None
    ) -> Items:
        """Make the items of the forget set, with the rows that the method looks at."""
        raise NotImplementedError

    @staticmethod
    def reference_fn(ref_head: Head, config: UnlearnConfig) -> ReferenceFn:
        """Return the function that computes ``used_ref_fields`` from the reference's hidden states.

        It is called before training, once for every item; never where ``used_ref_fields`` is empty.
        """
        raise NotImplementedError

    @staticmethod
    def cache_settings(config: UnlearnConfig) -> dict[str, Any]:
        """Return the settings on which the reference fields depend, beside the items: part of the cache's key."""
        return {}

    @staticmethod
    def hidden_states(body: nn.Module, packed: Packed, config: UnlearnConfig) -> tuple[Tensor, Tensor]:
        """Run the body over a packed row; return the states [T, d] that the method looks at, and the last ones."""
        last = body(**packed.inputs()).last_hidden_state[0]
        return last, last

    @classmethod
    def used_ref_fields(cls, config: UnlearnConfig) -> tuple[RefField, ...]:
        """Return those of ``ref_fields`` that a run reads: none that only a term of weight 0 would."""
        return cls.ref_fields if config.value("gamma") > 0 else ()

    @classmethod
    def uses_ref_head(cls, config: UnlearnConfig) -> bool:
        """Whether a run reads the reference's head."""
        return cls.needs_ref_head

    @staticmethod
    def uses_other_prompts(config: UnlearnConfig) -> bool:
        """Whether the reference sees the forget answers after the prompts of other rows."""
        return False

    @staticmethod
    def uses_retain(config: UnlearnConfig) -> bool:
        """Whether the retain set, where one is given, has a part in the loss."""
        return config.value("lambda_retain") > 0

    def forward(self, work: Batch | Callable[[], Any], *counts: Tensor) -> Any:
        """Compute :meth:`batch_losses`; or call a function, for :meth:`run`."""
        return self.batch_losses(work, *counts) if isinstance(work, Batch) else super().forward(work)

    def batch_losses(self, batch: Batch, counts: Tensor) -> Losses:
        """Compute the losses of a micro-batch.

        Args:
            batch: on the model's device.
            counts: int64 [4], the fields of :class:`palu.data.packing.Counts` summed over the whole optimisation
                step, by which the sums over this micro-batch are divided; a 0 counts as 1.
        """
        states, last = self.hidden_states(body_of(self.model), batch.packed, self.config)
        hidden, head = states.index_select(0, batch.rows), head_of(self.model)
        shares = Shares(*counts.clamp(min=1).to(acc_dtype(hidden.dtype)).reciprocal())
        total, terms = self.compute_losses(hidden, head, batch, shares)
        return Losses(total, terms, self._highest_probability(last, head, batch))

    def compute_losses(self, hidden: Tensor, head: Head, batch: Batch, shares: Shares) -> tuple[Tensor, Tensor]:
        """Compute (total, terms) from the hidden states [R, d] of the batch's rows."""
        raise NotImplementedError

    def after_step(self, record: dict[str, float]) -> dict[str, float]:
        """Take note of an optimisation step that was taken, by its figures; return figures to add to them.

        A resumed run calls it again for every step that was taken before: what a method remembers from step to
        step must follow from these calls.
        """
        return {}

    @torch.no_grad()
    def _highest_probability(self, last: Tensor, head: Head, batch: Batch) -> Tensor:
        if self.config.stop_probability is None:
            return last.new_full((), float("nan"), dtype=torch.float32)
        targets = slice(batch.counts.targets)
        hidden = last.index_select(0, batch.rows[targets])
        probability = map_logits(nll, hidden, head, batch.labels[targets], self.config.chunk_bytes).neg().exp().float()
        return torch.cat([probability.new_zeros(1), probability]).max()
