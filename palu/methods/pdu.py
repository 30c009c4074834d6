"""Constrained entropic unlearning by primal-dual steps (arXiv 2506.05314)::

    forget = mean over answer tokens of (max logit - mean logit)^2
    after each step: retain weight = max(0, retain weight + dual_step * (retain - retain_loss_bound))

The published code flattens every position, prompt and padding included; here the answer's. Its dual variable moves
after each micro-batch; here after each optimisation step, by the exact retain loss.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from palu.data.packing import Batch
from palu.methods.base import MethodSettings, Shares
from palu.methods.baseline import Baseline
from palu.models.lora import CausalLM
from palu.settings import RunSettings, not_negative


@dataclass(frozen=True)
class PDUSettings(MethodSettings):
    """Settings of PDU.

    Attributes:
        dual_step: step size of the retain loss's weight, which starts at ``lambda_retain``.
        retain_loss_bound: the retain loss above which that weight grows.
    """

    dual_step: float = not_negative(1.0)
    retain_loss_bound: float = not_negative(0.0)

    @property
    def uses_retain(self) -> bool:
        """Always: the weight may start at 0."""
        return True


class PDU(Baseline):
    """Primal-dual unlearning."""

    Settings = PDUSettings
    title = "primal-dual unlearning (PDU)"

    def __init__(self, model: CausalLM, config: RunSettings):
        super().__init__(model, config)
        self.weight = float(self.settings.lambda_retain)

    def retain_weight(self) -> float:
        """Return the dual variable, which may be 0."""
        return self.weight

    def forget_loss(self, logits: Tensor, batch: Batch, shares: Shares) -> Tensor:
        """Compute the mean squared distance of the highest logit from the mean logit."""
        return (logits.amax(-1) - logits.mean(-1)).square().sum() * shares.targets

    def after_step(self, record: dict[str, float]) -> dict[str, float]:
        """Move the dual variable."""
        used = self.weight
        change = self.settings.dual_step * (record["retain"] - self.settings.retain_loss_bound)
        self.weight = max(0.0, used + change)
        return {"retain_weight": used}
