"""Gradient ascent, and gradient difference (TOFU, arXiv 2401.06121)::

forget = -mean over answer tokens of the NLL
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from palu.data.packing import Batch
from palu.methods.base import MethodSettings, Shares
from palu.methods.baseline import Baseline
from palu.models.head import nll
from palu.settings import not_negative


class GradientDifference(Baseline):
    """Gradient ascent on the forget set, descent on the retain set."""

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
