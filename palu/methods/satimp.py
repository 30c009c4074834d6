"""SatImp (arXiv 2505.11953): gradient ascent, weighted by how well a token is known and how much is left of it::

    forget = -mean over answer tokens of p^beta1 * (1 - p)^beta2 * NLL, p the token's probability, held constant

Settings are open-unlearning's.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from palu.data.packing import Batch
from palu.methods.base import MethodSettings, Shares
from palu.methods.baseline import Baseline
from palu.models.head import nll
from palu.settings import not_negative


@dataclass(frozen=True)
class SatImpSettings(MethodSettings):
    """Settings of SatImp.

    Attributes:
        beta1: the power of a token's probability in its weight.
        beta2: the power of one less that probability.
    """

    lambda_retain: float = not_negative(0.1)
    beta1: float = not_negative(5.0)
    beta2: float = not_negative(1.0)


class SatImp(Baseline):
    """Gradient ascent with saturation and importance weights."""

    Settings = SatImpSettings
    title = "SatImp"

    def forget_loss(self, logits: Tensor, batch: Batch, shares: Shares) -> Tensor:
        """Compute minus the mean of the weighted token NLLs; no gradient flows through the weights."""
        loss = nll(logits, batch.labels[: len(logits)])
        p = loss.detach().neg().exp()
        weight = p**self.settings.beta1 * (1 - p) ** self.settings.beta2
        return -(weight * loss).sum() * shares.targets
