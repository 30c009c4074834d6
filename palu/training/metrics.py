"""The figures of an optimisation step, over all micro-batches and processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor

from palu.data.packing import Batch, Counts
from palu.methods.base import Losses


def sum_counts(counts: Sequence[Counts], accelerator: Accelerator) -> Tensor:
    """Sum the counts of all micro-batches of all processes: int64 [4], in the order of their fields."""
    return accelerator.reduce(torch.tensor(counts, device=accelerator.device).sum(0), "sum")


def losses_text(record: Mapping[str, float]) -> str:
    """Say the losses of a step's record, and what was evaluated after it: "loss 0.5, local 0.4, ..."."""
    others = ("step", "epoch", "tokens", "tokens_per_second", "grad_norm", "learning_rate")
    return ", ".join(f"{name} {value:.3g}" for name, value in record.items() if name not in others)


def gather_metrics(
    batches: Sequence[Batch],
    outputs: Sequence[Losses],
    grad_norm: Tensor,
    terms: Sequence[str],
    accelerator: Accelerator,
) -> dict[str, float]:
    """Gather the figures of a step from all processes, in the one read-back from the accelerator that a step costs.

    Args:
        batches, outputs: this process's micro-batches and their losses.
        grad_norm: scalar, the same on all processes.
        terms: names of the figures in ``Losses.terms``.

    Returns:
        loss, the terms, tokens, grad_norm, and onset_probability where it can end the run.
    """
    sums = torch.stack([torch.cat([losses.total.detach()[None], losses.terms]) for losses in outputs]).sum(0)
    tokens = sums.new_tensor([sum(sum(batch.packed.sequence_lengths) for batch in batches)])
    names = ["loss", *terms, "tokens", "grad_norm"]
    figures = [*accelerator.reduce(torch.cat([sums, tokens]), "sum"), grad_norm]
    highest = [losses.highest_probability for losses in outputs if losses.highest_probability is not None]
    if highest:
        names.append("onset_probability")
        figures.append(accelerator.gather(torch.stack(highest).max()).max())
    return dict(zip(names, torch.stack([f.float() for f in figures]).tolist(), strict=True))
