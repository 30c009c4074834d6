"""The training objective as one module: batch in, loss out, so that DDP, FSDP and DeepSpeed see one forward.

:class:`Objective` is what the loop needs of a method; :class:`PaluObjective` is PALU. The methods it is compared with
are in :mod:`palu.baselines`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from palu.adapter import CausalLM, base_of
from palu.cache import Ask
from palu.config import UnlearnConfig
from palu.data import Example
from palu.losses import CrossEntropyTerm, Head, KLTerm, LocalTerm, head_losses
from palu.ops import topk_mse, weight_mean
from palu.packing import Batch, Item, forget_items
from palu.reference import acc_dtype


class Losses(NamedTuple):
    """What a forward of an :class:`Objective` returns; only ``total`` has a gradient."""

    total: Tensor  # the weighted sum of the terms
    terms: Tensor  # one figure per name in ``Objective.terms``, each divided by the counts given
    highest_probability: Tensor  # of a true token at a target row; NaN when not asked for


class Objective(nn.Module):
    """A method of unlearning: which rows it looks at, what it asks the reference of them, and its loss.

    Args:
        model: a causal language model whose logits are ``output_embeddings(body(...))``.
        ref_head: the frozen reference's head (the model's own where that is frozen), if ``needs_ref_head``, else None.
        config: the settings; ``stop_probability`` decides whether probabilities are computed.
    """

    terms: ClassVar[tuple[str, ...]]  # names of the figures in Losses.terms
    needs_alternates: ClassVar[bool] = False  # whether forget rows must have a second answer to prefer
    needs_ref_head: ClassVar[bool] = False  # whether the loss reads the reference's head
    has_kl: ClassVar[bool] = False  # whether a KL keeps the other rows, so that anchors may be among them

    def __init__(self, model: CausalLM, ref_head: Head | None, config: UnlearnConfig):
        super().__init__()
        self.model = model
        self.ref_head = ref_head
        self.config = config
        # What FSDP2 shards as one: each decoder layer; embeddings and head belong to the objective itself.
        self._no_split_modules = base_of(model)._no_split_modules

    @staticmethod
    def items(
        examples: Sequence[Example], alternates: Sequence[Example], config: UnlearnConfig, eos_token_id: int | None
    ) -> list[Item]:
        """The forget set, with the rows that the method looks at."""
        raise NotImplementedError

    @staticmethod
    def ask(ref_head: Head, config: UnlearnConfig) -> Ask | None:
        """What the method wants to know of the reference, once per forget item; None: nothing."""
        return None

    @staticmethod
    def depends_on(config: UnlearnConfig) -> dict[str, Any]:
        """The settings that the reference's answers to this depend on, where the items are the same."""
        return {}

    @staticmethod
    def retains(config: UnlearnConfig) -> bool:
        """Whether the retain set, where one is given, has a part in the loss."""
        return config.value("lambda_retain") > 0

    def forward(self, batch: Batch, counts: Tensor) -> Losses:
        """Losses of a micro-batch.

        Args:
            batch: on the model's device.
            counts: [4], int64: ``Batch.counts`` summed over the whole optimisation step, by which the sums over
                this micro-batch are divided; a 0 counts as 1.
        """
        states = body_of(self.model)(**batch.packed.inputs()).last_hidden_state[0]
        hidden, head = states.index_select(0, batch.rows), head_of(self.model)
        share = counts.clamp(min=1).to(acc_dtype(hidden.dtype)).reciprocal()
        total, terms = self.losses(hidden, head, batch, share)
        targets = batch.counts[0]
        return Losses(total, terms, self._highest_probability(hidden[:targets], head, batch.labels[:targets]))

    def losses(self, hidden: Tensor, head: Head, batch: Batch, share: Tensor) -> tuple[Tensor, Tensor]:
        """(total, terms) from the hidden states [R, d] of the batch's rows; share: [4], one over the counts."""
        raise NotImplementedError

    def after_step(self, record: dict[str, float]) -> dict[str, float]:
        """Called with the figures of each optimisation step that was taken; returns figures to add to them.

        A resumed run calls it again for every step that was taken before: what an objective remembers from step to
        step must follow from these calls.
        """
        return {}

    @torch.no_grad()
    def _highest_probability(self, hidden: Tensor, head: Head, labels: Tensor) -> Tensor:
        if self.config.stop_probability is None:
            return hidden.new_full((), float("nan"), dtype=torch.float32)
        probability = per_token(nll, hidden, head, labels, self.config.chunk_bytes).neg().exp().float()
        return torch.cat([probability.new_zeros(1), probability]).max()


class PaluObjective(Objective):
    """PALU (arXiv 2601.03190): ``gamma * local + lambda_kl * kl + lambda_retain * retain``.

    The targets are the onset tokens, the others the ordinary ones; see :mod:`palu.losses` for the terms. Only rows
    with a role reach the head.
    """

    terms = ("local", "kl", "retain")
    needs_ref_head = True
    has_kl = True
    ref_head: Head

    def __init__(self, model: CausalLM, ref_head: Head, config: UnlearnConfig):
        super().__init__(model, ref_head, config)
        head = head_of(model)
        self.weight_mean = None if head.weight.requires_grad else weight_mean(head.weight)

    @staticmethod
    def items(
        examples: Sequence[Example], alternates: Sequence[Example], config: UnlearnConfig, eos_token_id: int | None
    ) -> list[Item]:
        """The forget set: its onset and its ordinary rows."""
        return forget_items(examples, config.n, eos_token_id)

    @staticmethod
    def ask(ref_head: Head, config: UnlearnConfig) -> Ask:
        """The indices of an onset row's highest logits (int32 [onset, K]), and what their loss is divided by ([onset]);
        an ordinary row's last hidden state ([ordinary, d])."""
        k = min(config.top_k, ref_head.weight.shape[0])
        rows = _rows_of_logits(ref_head, config.chunk_bytes)

        def ask(onset: Tensor, ordinary: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
            chunks = [_highest(as_accumulated(F.linear(chunk, *ref_head)), k, config) for chunk in onset.split(rows)]
            return *map(torch.cat, zip(*chunks, strict=True)), ordinary

        return ask

    @staticmethod
    def depends_on(config: UnlearnConfig) -> dict[str, Any]:
        """K, and what an onset row's loss is."""
        return {"top_k": config.top_k, "target": config.target if config.normalize else None}

    def losses(self, hidden: Tensor, head: Head, batch: Batch, share: Tensor) -> tuple[Tensor, Tensor]:
        """(total, [local, kl, retain])."""
        config, counts = self.config, batch.counts[:3]
        index, scale, ref_hidden = batch.reference
        parts = zip(config.weights, share[:3], counts, strict=True)
        of_local, *of_others = [(weight * part).expand(n) for weight, part, n in parts]
        scale = scale.to(of_local.dtype)  # a reference in float64 may be asked beside a model in float32
        row_weight = torch.cat([of_local / scale, *of_others])
        terms = (
            LocalTerm(index, config.target),
            KLTerm(ref_hidden, self.ref_head, reverse=config.kl_direction == "reverse"),
            CrossEntropyTerm(batch.labels[counts[0] + counts[1] :]),
        )
        total, losses = head_losses(
            hidden, head, terms, row_weight, chunk_bytes=config.chunk_bytes, weight_mean=self.weight_mean
        )
        local, kl, retain = losses.split(counts)
        return total, torch.stack([(local / scale).sum(), kl.sum(), retain.sum()]) * share[:3]


def _highest(logits: Tensor, k: int, config: UnlearnConfig) -> tuple[Tensor, Tensor]:
    """Of the reference's logits [r, V], the indices of the K highest, and the local loss, 1 where it does not scale."""
    index = logits.topk(k, dim=-1, sorted=False).indices.int()
    if not config.normalize:
        return index, logits.new_ones(len(logits))
    loss = topk_mse(logits, index, config.target)
    return index, loss.where(loss > 0, 1)  # K = 1 with the local mean has nothing to flatten


@torch.no_grad()
def per_token(
    function: Callable[[Tensor, Tensor], Tensor], hidden: Tensor, head: Head, labels: Tensor, chunk_bytes: int
) -> Tensor:
    """[R]: a function of the logits [r, V] and labels [r] of chunks of rows, from their hidden states [R, d]."""
    rows = _rows_of_logits(head, chunk_bytes)
    chunks = zip(hidden.split(rows), labels.split(rows), strict=True)
    return torch.cat([function(as_accumulated(F.linear(h, *head)), label) for h, label in chunks])


def nll(logits: Tensor, labels: Tensor) -> Tensor:
    """[R]: -log P(label), of logits [R, V]."""
    return F.cross_entropy(logits, labels, reduction="none")


def as_accumulated(logits: Tensor) -> Tensor:
    """Logits in the dtype in which softmax and sums are taken: float32, or float64 as they are."""
    return logits.to(acc_dtype(logits.dtype))


def _rows_of_logits(head: Head, chunk_bytes: int) -> int:
    return max(chunk_bytes // (head.weight.shape[0] * 4), 1)


def body_of(model: CausalLM) -> nn.Module:
    """The decoder without its head."""
    return base_of(model).get_decoder()


def head_of(model: CausalLM) -> Head:
    """The output layer's weight [V, d] and bias."""
    layer = base_of(model).get_output_embeddings()
    return Head(layer.weight, getattr(layer, "bias", None))
