"""Preferences against forget answers, means over examples of ``-2/beta * log sigmoid(beta * advantage)``::

    npo     advantage = NLL - NLL_ref                              (arXiv 2404.05868)
    dpo     advantage = (NLL - NLL_ref)(answer) - (NLL - NLL_ref)(alternate answer)
                                                        (arXiv 2305.18290; TOFU's "IdkDPO", arXiv 2401.06121)
    simnpo  advantage = NLL / tokens of the answer - delta         (arXiv 2410.07163)
    tpo     advantage = mean over sensitive tokens of (z_ref - z), z the true token's logit
            forget    = the preference + mean NLL of the other answer tokens      (arXiv 2506.03142)

with ``NLL`` the summed token NLL of the answer, ``NLL_ref`` the frozen reference's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from palu.data.packing import Batch, Items, forget_items, pair_items
from palu.methods.base import ForgetSet, MethodSettings, Reference, RefField, RefRows, Shares
from palu.methods.baseline import Baseline
from palu.models.head import Head, map_logits, nll
from palu.settings import RunSettings, is_number, not_negative, positive, setting


@dataclass(frozen=True)
class NPOSettings(MethodSettings):
    """Settings of NPO and DPO.

    Attributes:
        beta: inverse temperature of the preference.
    """

    beta: float = positive(0.1)


class NPO(Baseline):
    """Negative preference optimisation."""

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
        return preference(per_item(sign * drop, batch.item, batch.counts.examples), self.settings.beta, shares)


class DPO(NPO):
    """NPO with the tokens of an alternate answer as others."""

    title = "direct preference optimisation (DPO)"

    @staticmethod
    def make_items(forget: ForgetSet, config: RunSettings) -> Items:
        """Make the items of the forget set: the answer's tokens are targets, the alternate answer's others."""
        return pair_items(forget.examples, forget.alternates())


@dataclass(frozen=True)
class SimNPOSettings(MethodSettings):
    """Settings of SimNPO.

    Attributes:
        beta: inverse temperature of the preference.
        delta: margin on the mean token NLL.
    """

    gamma: float = not_negative(0.125)
    beta: float = positive(4.5)
    delta: float = setting(0.0, is_number, "give a finite number")


class SimNPO(Baseline):
    """Simple negative preference optimisation: NPO without a reference, by mean NLL."""

    Settings = SimNPOSettings
    title = "SimNPO"

    def forget_loss(self, logits: Tensor, batch: Batch, shares: Shares) -> Tensor:
        loss = nll(logits, batch.labels[: len(logits)])
        mean, _ = mean_per_item(loss, batch.item, batch.counts.examples)
        return preference(mean - self.settings.delta, self.settings.beta, shares)


@dataclass(frozen=True)
class TPOSettings(MethodSettings):
    """Settings of TPO.

    Attributes:
        beta: inverse temperature of the preference.
    """

    beta: float = positive(0.32)


class TPO(Baseline):
    """Targeted preference optimisation: sensitive tokens lose their logit, the others are kept."""

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
            return {"logit": map_logits(true_logit, rows.targets, head, rows.target_labels, config.chunk_bytes)}

        return Reference((RefField("logit", "targets"),) if config.method.gamma > 0 else (), compute)

    def forget_loss(self, logits: Tensor, batch: Batch, shares: Shares) -> Tensor:
        targets, labels = batch.counts.targets, batch.labels[: len(logits)]
        gap = batch.reference["logit"] - true_logit(logits[:targets], labels[:targets])
        mean, tokens = mean_per_item(gap, batch.item[:targets], batch.counts.examples)
        of_others = nll(logits[targets:], labels[targets:]).sum() * shares.others
        # Not every example has a sensitive token.
        return preference(mean[tokens > 0], self.settings.beta, shares) + of_others


def preference(advantage: Tensor, beta: float, shares: Shares) -> Tensor:
    """Compute -2/beta * log sigmoid(beta * advantage [items]), averaged over items."""
    return (-2 / beta * F.logsigmoid(beta * advantage)).sum() * shares.examples


def true_logit(logits: Tensor, labels: Tensor) -> Tensor:
    """Pick the label's logit from logits [R, V]: [R]."""
    return logits.gather(-1, labels[:, None])[:, 0]


def per_item(values: Tensor, item: Tensor, items: int) -> Tensor:
    """Sum the values [R] of each item: [items]. ``item``: [R], the item that each value belongs to."""
    return values.new_zeros(items).index_add(0, item, values)


def mean_per_item(values: Tensor, item: Tensor, items: int) -> tuple[Tensor, Tensor]:
    """Average the values [R] of each item: [items], NaN where it has none; and count them."""
    counts = per_item(torch.ones_like(values), item, items)
    return per_item(values, item, items) / counts, counts
