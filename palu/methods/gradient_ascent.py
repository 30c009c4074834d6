"""Gradient ascent on the tokens of forget answers, plain or weighted, means over all answer tokens::

    ga, gd  forget = -NLL                              (TOFU, arXiv 2401.06121; gd with a retain term)
    wga     forget = -p^beta * NLL                     (arXiv 2502.19301)
    satimp  forget = -p^beta1 * (1 - p)^beta2 * NLL    (arXiv 2505.11953; settings are open-unlearning's)

with ``p`` the token's probability, held constant: tokens that are forgotten already pull less.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from palu.data.packing import Batch
from palu.methods.base import MethodSettings, Shares
from palu.methods.baseline import Baseline
from palu.models.head import nll
from palu.settings import not_negative, positive


class GradientDifference(Baseline):
    """Gradient ascent on the forget set, descent on the retain set."""

    title = "gradient difference (GradDiff)"

    def forget_loss(self, logits: Tensor, batch: Batch, shares: Shares) -> Tensor:
        """Compute minus the mean token NLL, weighted; no gradient flows through the weights."""
        loss = nll(logits, batch.labels[: len(logits)])
        return -self.weighted(loss).sum() * shares.targets

    def weighted(self, loss: Tensor) -> Tensor:
        """Multiply each token's NLL by its weight: [R] from [R]."""
        return loss


@dataclass(frozen=True)
class GradientAscentSettings(MethodSettings):
    """Settings of gradient ascent: without a retain term."""

    lambda_retain: float = not_negative(0.0)


class GradientAscent(GradientDifference):
    """Gradient ascent on the forget set alone."""

    Settings = GradientAscentSettings
    title = "gradient ascent"


@dataclass(frozen=True)
class WGASettings(MethodSettings):
    """Settings of WGA.

    Attributes:
        beta: the power of a token's probability that is its weight.
    """

    beta: float = positive(1.0)


class WGA(GradientDifference):
    """Gradient ascent, weighted by how well a token is known."""

    Settings = WGASettings
    title = "weighted gradient ascent (WGA)"

    def weighted(self, loss: Tensor) -> Tensor:
        return (-self.settings.beta * loss.detach()).exp() * loss


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


class SatImp(GradientDifference):
    """Gradient ascent with saturation and importance weights."""

    Settings = SatImpSettings
    title = "SatImp"

    def weighted(self, loss: Tensor) -> Tensor:
        p = loss.detach().neg().exp()
        return p**self.settings.beta1 * (1 - p) ** self.settings.beta2 * loss
