"""Simple negative preference optimisation (arXiv 2410.07163): NPO without a reference, by mean NLL::

forget = mean over examples of -2/beta * log sigmoid(beta * (NLL / tokens of the answer - delta))
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from palu.data.packing import Batch
from palu.methods.base import MethodSettings, Shares
from palu.methods.baseline import Baseline, item_means, preference
from palu.models.head import nll
from palu.settings import is_number, not_negative, positive, setting


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
    """Simple negative preference optimisation."""

    Settings = SimNPOSettings
    title = "SimNPO"

    def forget_loss(self, logits: Tensor, batch: Batch, shares: Shares) -> Tensor:
        """Compute the preference against answers of a low mean NLL."""
        mean = item_means(nll(logits, batch.labels[: len(logits)]), batch.item, batch.counts.examples)
        return preference(mean - self.settings.delta, self.settings.beta, shares)
