"""The counts of an optimisation step, over all micro-batches and processes, and its losses in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor

from palu.data.packing import Counts


def sum_counts(counts: Sequence[Counts], accelerator: Accelerator) -> Tensor:
    """Sum the counts of all micro-batches of all processes: int64 [4], in the order of their fields."""
    return accelerator.reduce(torch.tensor(counts, device=accelerator.device).sum(0), "sum")


def losses_text(record: Mapping[str, float]) -> str:
    """Say the losses of a step's record, and what was evaluated after it: "loss 0.5, local 0.4, ..."."""
    others = ("step", "epoch", "tokens", "tokens_per_second", "grad_norm", "learning_rate")
    return ", ".join(f"{name} {value:.3g}" for name, value in record.items() if name not in others)
