"""Targeted preference optimisation (arXiv 2506.03142): sensitive tokens lose their logit, the others are kept::

forget = mean over examples of -2/beta * log sigmoid(beta * mean over sensitive tokens of (z_ref - z))
         + mean NLL of the other answer tokens, z the true token's logit
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from palu.data.packing import Batch, Items, forget_items
from palu.methods.base import ForgetSet, MethodSettings, Reference, RefField, RefRows, Shares
from palu.methods.baseline import Baseline, item_means, preference, true_logit
from palu.models.head import Head, map_logits, nll
from palu.settings import RunSettings, positive


@dataclass(frozen=True)
class TPOSettings(MethodSettings):
    """Settings of TPO.

    Attributes:
        beta: inverse temperature of the preference.
    """

    beta: float = positive(0.32)


class TPO(Baseline):
    """Targeted preference optimisation."""

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
        """Compute the module's loss; examples without a sensitive token have only its second part."""
        targets, labels = batch.counts.targets, batch.labels[: len(logits)]
        gap = batch.reference["logit"] - true_logit(logits[:targets], labels[:targets])
        advantage = item_means(gap, batch.item[:targets], batch.counts.examples)
        advantage = advantage[batch.item[:targets].unique()]  # not every example has a sensitive token
        of_others = nll(logits[targets:], labels[targets:]).sum() * shares.others
        return preference(advantage, self.settings.beta, shares) + of_others
