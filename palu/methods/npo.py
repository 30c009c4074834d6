"""Negative preference optimisation (arXiv 2404.05868)::

    forget = mean over examples of -2/beta * log sigmoid(beta * (NLL - NLL_ref))

with ``NLL`` the summed token NLL of the forget answer, ``NLL_ref`` the frozen reference's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from palu.data.packing import Batch
from palu.methods.base import MethodSettings, Reference, RefField, RefRows, Shares
from palu.methods.baseline import Baseline, per_item, preference
from palu.models.head import Head, map_logits, nll
from palu.settings import RunSettings, positive


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
