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
    wga      forget = -mean over tokens of p^beta * NLL, p the token's probability, held constant
                                                                          (arXiv 2502.19301)
    undial   forget = mean over tokens of KL(softmax(z_ref - beta * onehot(true token)) || softmax(z)), z all logits;
             no retain term                                               (arXiv 2402.10052)
    rmu      on the states of a layer: see :mod:`palu.methods.rmu`        (arXiv 2403.03218)

Preferences are averaged over the examples of the whole optimisation step, exactly. All answer tokens reach the head
at once: these are baselines, not the fast path. Where the papers leave a choice, it is that of open-unlearning.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from palu.config import UnlearnConfig
from palu.data.packing import Batch, Items, answer_items, forget_items, pair_items
from palu.data.tokenize import Example
from palu.losses import CrossEntropyTerm, KLTerm, fused_linear_losses
from palu.methods.base import Method, ReferenceFn, RefField, RefRows, Shares
from palu.models.head import Head, map_logits, nll
from palu.models.lora import CausalLM


class Baseline(Method):
    """A forget loss on the logits of whole answers, and the cross-entropy of the retain set."""

    terms = ("forget", "retain")

    @staticmethod
    def make_items(
        examples: Sequence[Example], alternates: Sequence[Example], config: UnlearnConfig, eos_token_id: int | None
    ) -> Items:
        """Make the items of the forget set: every answer token is a target."""
        return answer_items(examples)

    def compute_losses(self, hidden: Tensor, head: Head, batch: Batch, shares: Shares) -> tuple[Tensor, Tensor]:
        """Compute (total, [forget, retain])."""
        answers, gamma = len(batch.item), self.config.value("gamma")
        forget = shares.targets.new_zeros(())
        if gamma > 0:
            forget = self.loss_from_hidden(hidden[:answers], head, batch, shares)
        retained, _ = fused_linear_losses(
            hidden[answers:],
            head,
            (CrossEntropyTerm(batch.labels[answers:]),),
            shares.retain.expand(batch.counts.retain).contiguous(),
            chunk_bytes=self.config.chunk_bytes,
        )
        total = gamma * forget + self.retain_weight() * retained
        return total, torch.stack([forget, retained]).detach()

    def loss_from_hidden(self, hidden: Tensor, head: Head, batch: Batch, shares: Shares) -> Tensor:
        """Compute the forget loss from the hidden states [R, d] of target and other rows."""
        return self.forget_loss(head.logits(hidden), batch, shares)

    def forget_loss(self, logits: Tensor, batch: Batch, shares: Shares) -> Tensor:
        """Compute the forget loss from the logits [R, V] of target and other rows."""
        raise NotImplementedError

    def retain_weight(self) -> float:
        """Return the factor of the retain loss."""
        return self.config.value("lambda_retain")

    def preference(self, advantage: Tensor, shares: Shares) -> Tensor:
        """Compute -2/beta * log sigmoid(beta * advantage [items]), averaged over items."""
        beta = self.config.value("beta")
        return (-2 / beta * F.logsigmoid(beta * advantage)).sum() * shares.examples


class GradientAscent(Baseline):
    """Gradient ascent, and with a retain term gradient difference (arXiv 2401.06121)."""

    def forget_loss(self, logits: Tensor, batch: Batch, shares: Shares) -> Tensor:
        """Compute minus the mean token NLL."""
        return -nll(logits, batch.labels[: len(logits)]).sum() * shares.targets


class NPO(Baseline):
    """Negative preference optimisation (arXiv 2404.05868)."""

    ref_fields = (RefField("target_nll", "targets"), RefField("other_nll", "others"))

    @staticmethod
    def reference_fn(ref_head: Head, config: UnlearnConfig) -> ReferenceFn:
        """Return the function that gives the NLL of every answer token."""

        def reference_fields(rows: RefRows) -> dict[str, Tensor]:
            return {
                "target_nll": map_logits(nll, rows.targets, ref_head, rows.target_labels, config.chunk_bytes),
                "other_nll": map_logits(nll, rows.others, ref_head, rows.other_labels, config.chunk_bytes),
            }

        return reference_fields

    def forget_loss(self, logits: Tensor, batch: Batch, shares: Shares) -> Tensor:
        """Compute the preference against the answer; DPO's others are the tokens of the preferred one."""
        drop = nll(logits, batch.labels[: len(logits)]) - torch.cat(
            [batch.reference["target_nll"], batch.reference["other_nll"]]
        )
        targets = batch.counts.targets
        sign = torch.cat([drop.new_ones(targets), -drop.new_ones(len(drop) - targets)])
        return self.preference(per_item(sign * drop, batch.item, batch.counts.examples), shares)


class DPO(NPO):
    """Direct preference optimisation towards an alternate answer (arXiv 2305.18290, arXiv 2401.06121)."""

    needs_alternates = True

    @staticmethod
    def make_items(
        examples: Sequence[Example], alternates: Sequence[Example], config: UnlearnConfig, eos_token_id: int | None
    ) -> Items:
        """Make the items of the forget set: the answer's tokens are targets, the alternate answer's others."""
        return pair_items(examples, alternates)


class SimNPO(Baseline):
    """Simple negative preference optimisation (arXiv 2410.07163): NPO without a reference, by mean NLL."""

    def forget_loss(self, logits: Tensor, batch: Batch, shares: Shares) -> Tensor:
        """Compute the loss of the module's table."""
        loss = nll(logits, batch.labels[: len(logits)])
        total, tokens = (
            per_item(values, batch.item, batch.counts.examples) for values in (loss, torch.ones_like(loss))
        )
        return self.preference(total / tokens - self.config.delta, shares)


class PDU(Baseline):
    """Constrained entropic unlearning by primal-dual steps (arXiv 2506.05314).

    The published code flattens every position, prompt and padding included; here the answer's. Its dual variable moves
    after each micro-batch; here after each optimisation step, by the exact retain loss.
    """

    def __init__(self, model: CausalLM, config: UnlearnConfig):
        super().__init__(model, config)
        self.weight = float(config.value("lambda_retain"))

    def forget_loss(self, logits: Tensor, batch: Batch, shares: Shares) -> Tensor:
        """Compute the mean squared distance of the highest logit from the mean logit."""
        return (logits.amax(-1) - logits.mean(-1)).square().sum() * shares.targets

    def retain_weight(self) -> float:
        """Return the dual variable."""
        return self.weight

    def after_step(self, record: dict[str, float]) -> dict[str, float]:
        """Move the dual variable."""
        used = self.weight
        self.weight = max(0.0, used + self.config.dual_step * (record["retain"] - self.config.retain_loss_bound))
        return {"retain_weight": used}

    @staticmethod
    def uses_retain(config: UnlearnConfig) -> bool:
        """Always: a dual variable may start at 0."""
        return True


class TPO(Baseline):
    """Targeted preference optimisation (arXiv 2506.03142): sensitive tokens lose their logit, the others are kept."""

    ref_fields = (RefField("logit", "targets"),)

    @staticmethod
    def make_items(
        examples: Sequence[Example], alternates: Sequence[Example], config: UnlearnConfig, eos_token_id: int | None
    ) -> Items:
        """Make the items of the forget set: all sensitive tokens are targets, all ordinary ones others."""
        return forget_items(examples, -1, eos_token_id)

    @staticmethod
    def reference_fn(ref_head: Head, config: UnlearnConfig) -> ReferenceFn:
        """Return the function that gives the true token's logit at the sensitive tokens."""

        def reference_fields(rows: RefRows) -> dict[str, Tensor]:
            return {"logit": map_logits(true_logit, rows.targets, ref_head, rows.target_labels, config.chunk_bytes)}

        return reference_fields

    def forget_loss(self, logits: Tensor, batch: Batch, shares: Shares) -> Tensor:
        """Compute the loss of the module's table; examples without a sensitive token have only its second part."""
        targets, labels = batch.counts.targets, batch.labels[: len(logits)]
        gap = batch.reference["logit"] - true_logit(logits[:targets], labels[:targets])
        total, tokens = (
            per_item(values, batch.item[:targets], batch.counts.examples) for values in (gap, torch.ones_like(gap))
        )
        advantage = (total / tokens)[tokens > 0]  # not every example has a sensitive token
        preference = self.preference(advantage, shares)
        return preference + nll(logits[targets:], labels[targets:]).sum() * shares.others


class WGA(Baseline):
    """Weighted gradient ascent (arXiv 2502.19301): tokens that are forgotten already pull less."""

    def forget_loss(self, logits: Tensor, batch: Batch, shares: Shares) -> Tensor:
        """Compute minus the mean of the weighted token NLLs; no gradient flows through the weights."""
        loss = nll(logits, batch.labels[: len(logits)])
        weight = (-self.config.value("beta") * loss.detach()).exp()
        return -(weight * loss).sum() * shares.targets


class UNDIAL(Baseline):
    """Self-distillation from the reference with the true token's logit lowered (arXiv 2402.10052).

    The paper's loss is the cross-entropy; the KL is that less a constant. open-unlearning averages over all positions,
    prompt and padding included; here over the answer's.
    """

    ref_fields = (RefField("hidden", "targets"),)  # [answer tokens, d]: the last hidden state
    needs_ref_head = True

    @classmethod
    def uses_ref_head(cls, config: UnlearnConfig) -> bool:
        """Whether the forget loss has a weight."""
        return config.value("gamma") > 0

    @staticmethod
    def reference_fn(ref_head: Head, config: UnlearnConfig) -> ReferenceFn:
        """Return the function that keeps the last hidden state of every answer token."""
        return lambda rows: {"hidden": rows.targets}

    def loss_from_hidden(self, hidden: Tensor, head: Head, batch: Batch, shares: Shares) -> Tensor:
        """Compute the mean KL to the lowered reference."""
        lowered = batch.labels[: len(hidden)]
        term = KLTerm(
            batch.reference["hidden"], self.ref_head or head, False, lowered, lowered_by=self.config.value("beta")
        )
        weight = shares.targets.expand(len(hidden)).contiguous()
        total, _ = fused_linear_losses(hidden, head, (term,), weight, chunk_bytes=self.config.chunk_bytes)
        return total


def true_logit(logits: Tensor, labels: Tensor) -> Tensor:
    """Pick the label's logit from logits [R, V]: [R]."""
    return logits.gather(-1, labels[:, None])[:, 0]


def per_item(values: Tensor, item: Tensor, items: int) -> Tensor:
    """Sum the values [R] of each item: [items]. ``item``: [R], the item that each value belongs to."""
    return values.new_zeros(items).index_add(0, item, values)
