"""The methods that PALU is compared with, behind the same loop: ``palu.unlearn(..., objective="npo")``.

Each loss is ``gamma * forget + lambda_retain * retain``, retain the mean token cross-entropy of the retain set. With
``NLL(y)`` the summed token NLL of a forget answer, ``|y|`` its tokens, ``NLL_ref`` the frozen reference's::

    ga       forget = -mean over tokens of the NLL                        (gradient ascent; no retain term)
    gd       the same, with the retain term                               (TOFU, arXiv 2401.06121)
    npo      forget = -2/beta * log sigmoid(beta * (NLL - NLL_ref))       (arXiv 2404.05868)
    dpo      forget = -2/beta * log sigmoid(beta * ((NLL - NLL_ref)(y) - (NLL - NLL_ref)(alternate)))
                                                                          (arXiv 2305.18290; TOFU's "IdkDPO")
    simnpo   forget = -2/beta * log sigmoid(beta * (NLL / |y| - delta))   (arXiv 2410.07163)
    pdu      forget = mean over tokens of (max logit - mean logit)^2      (arXiv 2506.05314)
             after each step: retain weight = max(0, retain weight + dual_step * (retain - retain_loss_bound))
    tpo      forget = -2/beta * log sigmoid(beta * mean over sensitive tokens of (z_ref - z)) + mean NLL of the other
             answer tokens, z the true token's logit                      (arXiv 2506.03142)

Preferences are averaged over the examples of the whole optimisation step, exactly. All answer tokens reach the head
at once: these are baselines, not the fast path. Where the papers leave a choice, it is that of open-unlearning.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from palu.adapter import CausalLM
from palu.cache import Ask
from palu.config import UnlearnConfig
from palu.data import Example
from palu.losses import CrossEntropyTerm, Head, head_losses
from palu.objective import Objective, PaluObjective, as_accumulated, nll, per_token
from palu.packing import Batch, Item, answer_items, forget_items, pair_items


class Baseline(Objective):
    """A forget loss on the logits of whole answers, and the cross-entropy of the retain set."""

    terms = ("forget", "retain")

    @staticmethod
    def items(
        examples: Sequence[Example], alternates: Sequence[Example], config: UnlearnConfig, eos_token_id: int | None
    ) -> list[Item]:
        """The forget set: every answer token is a target."""
        return answer_items(examples)

    def losses(self, hidden: Tensor, head: Head, batch: Batch, share: Tensor) -> tuple[Tensor, Tensor]:
        """(total, [forget, retain])."""
        answers = len(batch.item)
        forget = self.forget(as_accumulated(F.linear(hidden[:answers], *head)), batch, share)
        retained, _ = head_losses(
            hidden[answers:],
            head,
            (CrossEntropyTerm(batch.labels[answers:]),),
            share[2].expand(batch.counts[2]).contiguous(),
            chunk_bytes=self.config.chunk_bytes,
        )
        total = self.config.value("gamma") * forget + self.retain_weight() * retained
        return total, torch.stack([forget, retained]).detach()

    def forget(self, logits: Tensor, batch: Batch, share: Tensor) -> Tensor:
        """The forget loss, from the logits [R, V] of target and other rows; see :meth:`Objective.losses`."""
        raise NotImplementedError

    def retain_weight(self) -> float:
        """The factor of the retain loss."""
        return self.config.value("lambda_retain")

    def preference(self, advantage: Tensor, share: Tensor) -> Tensor:
        """-2/beta * log sigmoid(beta * advantage [items]), averaged over items."""
        beta = self.config.value("beta")
        return (-2 / beta * F.logsigmoid(beta * advantage)).sum() * share[3]


class GradientAscent(Baseline):
    """Gradient ascent, and with a retain term gradient difference (arXiv 2401.06121)."""

    def forget(self, logits: Tensor, batch: Batch, share: Tensor) -> Tensor:
        """-mean token NLL."""
        return -nll(logits, batch.labels[: len(logits)]).sum() * share[0]


class NPO(Baseline):
    """Negative preference optimisation (arXiv 2404.05868)."""

    @staticmethod
    def ask(ref_head: Head, config: UnlearnConfig) -> Ask:
        """The NLL of every answer token."""

        def ask(targets: Tensor, others: Tensor, target_labels: Tensor, other_labels: Tensor) -> tuple[Tensor, Tensor]:
            return (
                per_token(nll, targets, ref_head, target_labels, config.chunk_bytes),
                per_token(nll, others, ref_head, other_labels, config.chunk_bytes),
            )

        return ask

    def forget(self, logits: Tensor, batch: Batch, share: Tensor) -> Tensor:
        """The answer is the dispreferred one; DPO's others are the preferred answer's tokens."""
        drop = nll(logits, batch.labels[: len(logits)]) - torch.cat(batch.reference)
        targets = batch.counts[0]
        sign = torch.cat([drop.new_ones(targets), -drop.new_ones(len(drop) - targets)])
        return self.preference(per_item(sign * drop, batch.item, batch.counts[3]), share)


class DPO(NPO):
    """Direct preference optimisation towards an alternate answer (arXiv 2305.18290, arXiv 2401.06121)."""

    needs_alternates = True

    @staticmethod
    def items(
        examples: Sequence[Example], alternates: Sequence[Example], config: UnlearnConfig, eos_token_id: int | None
    ) -> list[Item]:
        """The forget set: every answer token is a target, every token of the alternate answer an other."""
        return pair_items(examples, alternates)


class SimNPO(Baseline):
    """Simple negative preference optimisation (arXiv 2410.07163): NPO without a reference, by mean NLL."""

    def forget(self, logits: Tensor, batch: Batch, share: Tensor) -> Tensor:
        """See the module's table."""
        loss = nll(logits, batch.labels[: len(logits)])
        total, tokens = (per_item(values, batch.item, batch.counts[3]) for values in (loss, torch.ones_like(loss)))
        return self.preference(total / tokens - self.config.delta, share)


class PDU(Baseline):
    """Constrained entropic unlearning by primal-dual steps (arXiv 2506.05314).

    The published code flattens every position, prompt and padding included; here the answer's. Its dual variable moves
    after each micro-batch; here after each optimisation step, by the exact retain loss.
    """

    def __init__(self, model: CausalLM, ref_head: Head | None, config: UnlearnConfig):
        super().__init__(model, ref_head, config)
        self.weight = float(config.value("lambda_retain"))

    def forget(self, logits: Tensor, batch: Batch, share: Tensor) -> Tensor:
        """Squared distance of the highest logit from the mean."""
        return (logits.amax(-1) - logits.mean(-1)).square().sum() * share[0]

    def retain_weight(self) -> float:
        """The dual variable."""
        return self.weight

    def after_step(self, record: dict[str, float]) -> dict[str, float]:
        """Move the dual variable."""
        used = self.weight
        self.weight = max(0.0, used + self.config.dual_step * (record["retain"] - self.config.retain_loss_bound))
        return {"retain_weight": used}

    @staticmethod
    def retains(config: UnlearnConfig) -> bool:
        """Always: a dual variable may start at 0."""
        return True


class TPO(Baseline):
    """Targeted preference optimisation (arXiv 2506.03142): sensitive tokens lose their logit, the others are kept."""

    @staticmethod
    def items(
        examples: Sequence[Example], alternates: Sequence[Example], config: UnlearnConfig, eos_token_id: int | None
    ) -> list[Item]:
        """The forget set: all sensitive tokens are targets, all ordinary ones others."""
        return forget_items(examples, -1, eos_token_id)

    @staticmethod
    def ask(ref_head: Head, config: UnlearnConfig) -> Ask:
        """The true token's logit at the sensitive tokens."""

        def ask(targets: Tensor, others: Tensor, labels: Tensor, _: Tensor) -> tuple[Tensor, ...]:
            return (per_token(true_logit, targets, ref_head, labels, config.chunk_bytes),)

        return ask

    def forget(self, logits: Tensor, batch: Batch, share: Tensor) -> Tensor:
        """See the module's table; examples without a sensitive token have only the second part."""
        targets, labels = batch.counts[0], batch.labels[: len(logits)]
        gap = batch.reference[0] - true_logit(logits[:targets], labels[:targets])
        total, tokens = (
            per_item(values, batch.item[:targets], batch.counts[3]) for values in (gap, torch.ones_like(gap))
        )
        advantage = (total / tokens)[tokens > 0]  # not every example has a sensitive token
        preference = self.preference(advantage, share)
        return preference + nll(logits[targets:], labels[targets:]).sum() * share[1]


def true_logit(logits: Tensor, labels: Tensor) -> Tensor:
    """[R]: the label's logit, of logits [R, V]."""
    return logits.gather(-1, labels[:, None])[:, 0]


def per_item(values: Tensor, item: Tensor, items: int) -> Tensor:
    """[items]: sum of the values [R] of each item; item: [R], whose each value is."""
    return values.new_zeros(items).index_add(0, item, values)


OBJECTIVES: dict[str, type[Objective]] = {
    "palu": PaluObjective,
    "ga": GradientAscent,
    "gd": GradientAscent,
    "dpo": DPO,
    "npo": NPO,
    "simnpo": SimNPO,
    "pdu": PDU,
    "tpo": TPO,
}
