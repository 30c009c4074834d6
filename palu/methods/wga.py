"""Weighted gradient ascent (arXiv 2502.19301): tokens that are forgotten already pull less::

forget = -mean over answer tokens of p^beta * NLL, p the token's probability, held constant
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from palu.data.packing import Batch
from palu.methods.base import MethodSettings, Shares
from palu.methods.baseline import Baseline
from palu.models.head import nll
from palu.settings import positive


@dataclass(frozen=True)
class WGASettings(MethodSettings):
    """Settings of WGA.

    Attributes:
        beta: the power of a token's probability that is its weight.
    """

    beta: float = positive(1.0)


class WGA(Baseline):
    """Weighted gradient ascent."""

    Settings = WGASettings
    title = "weighted gradient ascent (WGA)"

    def forget_loss(self, logits: Tensor, batch: Batch, shares: Shares) -> Tensor:
        """Compute minus the mean of the weighted token NLLs; no gradient flows through the weights."""
        loss = nll(logits, batch.labels[: len(logits)])
        weight = (-self.settings.beta * loss.detach()).exp()
        return -(weight * loss).sum() * shares.targets
