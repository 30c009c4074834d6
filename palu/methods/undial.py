"""Self-distillation from the reference with the true token's logit lowered (arXiv 2402.10052)::

    forget = mean over answer tokens of KL(softmax(z_ref - beta * onehot(true token)) || softmax(z)), z all logits

The paper's loss is the cross-entropy; the KL is that less a constant. open-unlearning averages over all positions,
prompt and padding included; here over the answer's.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from palu.data.packing import Batch
from palu.losses import KLTerm
from palu.methods.base import MethodSettings, Reference, RefField, RowTerm, Shares
from palu.methods.baseline import Baseline
from palu.models.head import Head
from palu.settings import RunSettings, not_negative, positive


@dataclass(frozen=True)
class UNDIALSettings(MethodSettings):
    """Settings of UNDIAL.

    Attributes:
        beta: what the true token's logit is lowered by.
    """

    lambda_retain: float = not_negative(0.0)
    beta: float = positive(10.0)


class UNDIAL(Baseline):
    """Self-distillation with adjusted logits."""

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
