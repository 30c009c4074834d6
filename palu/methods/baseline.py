"""The methods that PALU is compared with: a loss on whole forget answers, and the cross-entropy of the retain set.

Each loss is ``gamma * forget + lambda_retain * retain``; a method's docstring has its ``forget``, with ``NLL`` the
summed token NLL of a forget answer and ``NLL_ref`` the frozen reference's. Preferences are averaged over the examples
of the whole optimisation step, exactly. All answer tokens reach the head at once: these are baselines, not the fast
path. Where the papers leave a choice, it is that of open-unlearning.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from palu.data.packing import Batch, Items, answer_items, forget_items, pair_items
from palu.losses import KLTerm
from palu.methods.base import (
    ForgetSet,
    Method,
    MethodSettings,
    Reference,
    RefField,
    RefRows,
    RowTerm,
    Shares,
    WeightedTerm,
    retain_term,
)
from palu.models.head import Head, map_logits, nll
from palu.settings import RunSettings, is_number, not_negative, positive, setting


class Baseline(Method):
    """A forget loss on the logits of whole answers, and the cross-entropy of the retain set."""

    @staticmethod
    def make_items(forget: ForgetSet, config: RunSettings) -> Items:
        """Make the items of the forget set: every answer token is a target."""
        return answer_items(forget.examples)

    def compute_losses(self, hidden: Tensor, head: Head, batch: Batch, shares: Shares) -> list[WeightedTerm]:
        """Return the forget loss and the cross-entropy."""
        answers, gamma = len(batch.item), self.settings.gamma
        terms: list[WeightedTerm] = []
        if gamma > 0:
            terms.append(("forget", self.forget_term(hidden[:answers], head, batch, shares), gamma))
        if self.settings.lambda_retain > 0:
            terms.append(("retain", retain_term(batch), self.settings.lambda_retain))
        return terms

    def forget_term(self, hidden: Tensor, head: Head, batch: Batch, shares: Shares) -> RowTerm | Tensor:
        """Return the forget loss, from the hidden states [R, d] of target and other rows."""
        return self.forget_loss(head.logits(hidden), batch, shares)

    def forget_loss(self, logits: Tensor, batch: Batch, shares: Shares) -> Tensor:
        """Compute the forget loss from the logits [R, V] of target and other rows."""
        raise NotImplementedError


# --- Gradient ascent ---
class GradientDifference(Baseline):
    """Gradient ascent on the forget set, descent on the retain set (TOFU, arXiv 2401.06121)::

    forget = -mean over answer tokens of the NLL
    """

    title = "gradient difference (GradDiff)"

    def forget_loss(self, logits: Tensor, batch: Batch, shares: Shares) -> Tensor:
        """Compute minus the mean token NLL."""
        return -nll(logits, batch.labels[: len(logits)]).sum() * shares.targets


@dataclass(frozen=True)
class GradientAscentSettings(MethodSettings):
    """Settings of gradient ascent: without a retain term."""

    lambda_retain: float = not_negative(0.0)


class GradientAscent(GradientDifference):
    """Gradient ascent on the forget set alone."""

    Settings = GradientAscentSettings
    title = "gradient ascent"


@dataclass(frozen=True)
class SatImpSettings(MethodSettings):
    """Settings of SatImp, open-unlearning's.

    Attributes:
        beta1: the power of a token's probability in its weight.
        beta2: the power of one less that probability.
    """

    lambda_retain: float = not_negative(0.1)
    beta1: float = not_negative(5.0)
    beta2: float = not_negative(1.0)


class SatImp(Baseline):
    """Gradient ascent, weighted by how well a token is known and how much is left of it (arXiv 2505.11953)::

    forget = -mean over answer tokens of p^beta1 * (1 - p)^beta2 * NLL, p the token's probability, held constant
    """

    Settings = SatImpSettings
    title = "SatImp"

    def forget_loss(self, logits: Tensor, batch: Batch, shares: Shares) -> Tensor:
        """Compute minus the mean of the weighted token NLLs; no gradient flows through the weights."""
        loss = nll(logits, batch.labels[: len(logits)])
        p = loss.detach().neg().exp()
        weight = p**self.settings.beta1 * (1 - p) ** self.settings.beta2
        return -(weight * loss).sum() * shares.targets


# --- Preferences ---
def preference(advantage: Tensor, beta: float, shares: Shares) -> Tensor:
    """Compute -2/beta * log sigmoid(beta * advantage [items]), averaged over items."""
    return (-2 / beta * F.logsigmoid(beta * advantage)).sum() * shares.examples


def per_item(values: Tensor, batch: Batch) -> Tensor:
    """Sum values of the first R rows of a batch over each of its items: [items]."""
    return values.new_zeros(batch.counts.examples).index_add(0, batch.item[: len(values)], values)


@dataclass(frozen=True)
class NPOSettings(MethodSettings):
    """Settings of NPO and DPO.

    Attributes:
        beta: inverse temperature of the preference.
    """

    beta: float = positive(0.1)


class NPO(Baseline):
    """Negative preference optimisation (arXiv 2404.05868)::

    forget = mean over examples of -2/beta * log sigmoid(beta * (NLL - NLL_ref))
    """

    Settings = NPOSettings
    title = "negative preference optimisation (NPO)"

    @staticmethod
    def reference(config: RunSettings) -> Reference:
        """Return: the NLL of every answer token."""

        def compute(rows: RefRows, head: Head) -> dict[str, Tensor]:
            return {
                "target_nll": map_logits(nll, rows.targets, head, rows.target_labels, config.chunk_bytes),
                "other_nll": map_logits(nll, rows.others, head, rows.other_labels, config.chunk_bytes),
            }

        fields = RefField("target_nll", "targets"), RefField("other_nll", "others")
        return Reference(fields if config.method.gamma > 0 else (), compute)

    def forget_loss(self, logits: Tensor, batch: Batch, shares: Shares) -> Tensor:
        """Compute the preference against the answer; others, if there are any, are tokens of a preferred one."""
        drop = nll(logits, batch.labels[: len(logits)]) - torch.cat(
            [batch.reference["target_nll"], batch.reference["other_nll"]]
        )
        targets = batch.counts.targets
        sign = torch.cat([drop.new_ones(targets), -drop.new_ones(len(drop) - targets)])
        return preference(per_item(sign * drop, batch), self.settings.beta, shares)


class DPO(NPO):
    """Direct preference optimisation towards an alternate answer (arXiv 2305.18290; TOFU's "IdkDPO")::

    forget = mean over examples of -2/beta * log sigmoid(beta * ((NLL - NLL_ref)(answer) - (NLL - NLL_ref)(alternate)))
    """

    title = "direct preference optimisation (DPO)"

    @staticmethod
    def make_items(forget: ForgetSet, config: RunSettings) -> Items:
        """Make the items of the forget set: the answer's tokens are targets, the alternate answer's others."""
        return pair_items(forget.examples, forget.alternates())


@dataclass(frozen=True)
class SimNPOSettings(NPOSettings):
    """Settings of SimNPO.

    Attributes:
        delta: margin on the mean token NLL.
    """

    gamma: float = not_negative(0.125)
    beta: float = positive(4.5)
    delta: float = setting(0.0, is_number, "give a finite number")


class SimNPO(Baseline):
    """Simple negative preference optimisation (arXiv 2410.07163): NPO without a reference, by mean NLL::

    forget = mean over examples of -2/beta * log sigmoid(beta * (NLL / tokens of the answer - delta))
    """

    Settings = SimNPOSettings
    title = "SimNPO"

    def forget_loss(self, logits: Tensor, batch: Batch, shares: Shares) -> Tensor:
        """Compute the preference against answers of a low mean NLL."""
        loss = nll(logits, batch.labels[: len(logits)])
        mean = per_item(loss, batch) / per_item(torch.ones_like(loss), batch)
        return preference(mean - self.settings.delta, self.settings.beta, shares)


@dataclass(frozen=True)
class TPOSettings(NPOSettings):
    """Settings of TPO."""

    beta: float = positive(0.32)


class TPO(Baseline):
    """Targeted preference optimisation (arXiv 2506.03142): sensitive tokens lose their logit, the others are kept::

    forget = mean over examples of -2/beta * log sigmoid(beta * mean over sensitive tokens of (z_ref - z))
             + mean NLL of the other answer tokens, z the true token's logit
    """

    Settings = TPOSettings
    title = "TPO"

    @staticmethod
    def make_items(forget: ForgetSet, config: RunSettings) -> Items:
        """Make the items of the forget set: all sensitive tokens are targets, all ordinary ones others."""
        return forget_items(forget.examples, -1, forget.eos_token_id)

    @staticmethod
    def reference(config: RunSettings) -> Reference:
        """Return: the true token's logit at the sensitive tokens."""

        def compute(rows: RefRows, head: Head) -> dict[str, Tensor]:
            return {"logit": map_logits(_true_logit, rows.targets, head, rows.target_labels, config.chunk_bytes)}

        return Reference((RefField("logit", "targets"),) if config.method.gamma > 0 else (), compute)

    def forget_loss(self, logits: Tensor, batch: Batch, shares: Shares) -> Tensor:
        """Compute both parts; examples without a sensitive token have only the second."""
        targets, labels = batch.counts.targets, batch.labels[: len(logits)]
        gap = batch.reference["logit"] - _true_logit(logits[:targets], labels[:targets])
        tokens = per_item(torch.ones_like(gap), batch)
        advantage = (per_item(gap, batch) / tokens)[tokens > 0]
        of_others = nll(logits[targets:], labels[targets:]).sum() * shares.others
        return preference(advantage, self.settings.beta, shares) + of_others


def _true_logit(logits: Tensor, labels: Tensor) -> Tensor:
    """Pick the label's logit from logits [R, V]: [R]."""
    return logits.gather(-1, labels[:, None])[:, 0]


# --- Self-distillation ---
@dataclass(frozen=True)
class UNDIALSettings(MethodSettings):
    """Settings of UNDIAL.

    Attributes:
        beta: what the true token's logit is lowered by.
    """

    lambda_retain: float = not_negative(0.0)
    beta: float = positive(10.0)


class UNDIAL(Baseline):
    """Self-distillation from the reference with the true token's logit lowered (arXiv 2402.10052)::

        forget = mean over answer tokens of KL(softmax(z_ref - beta * onehot(true token)) || softmax(z)), z all logits

    The paper's loss is the cross-entropy; the KL is that less a constant. open-unlearning averages over all positions,
    prompt and padding included; here over the answer's.
    """

    Settings = UNDIALSettings
    title = "UNDIAL"

    @staticmethod
    def reference(config: RunSettings) -> Reference:
        """Return: the last hidden state of every answer token, and the head."""
        if config.method.gamma == 0:
            return Reference()
        return Reference((RefField("hidden", "targets"),), lambda rows, head: {"hidden": rows.targets}, head=True)

    def forget_term(self, hidden: Tensor, head: Head, batch: Batch, shares: Shares) -> RowTerm:
        """Return the KL to the lowered reference."""
        states, labels = batch.reference["hidden"], batch.labels[: batch.counts.targets]
        ref_head = self.ref_head or head
        return RowTerm("targets", KLTerm(states, ref_head, False, labels, lowered_by=self.settings.beta))
