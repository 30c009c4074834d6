"""PALU (arXiv 2601.03190): local entropy on onset tokens, KL on ordinary ones, cross-entropy on the retain set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from palu.config import UnlearnConfig
from palu.data.packing import Batch, Item, forget_items
from palu.data.tokenize import Example
from palu.losses import CrossEntropyTerm, KLTerm, LocalTerm, fused_linear_losses
from palu.methods.base import Method, ReferenceFn, RefField, RefRows, Shares
from palu.models.head import Head, head_of, rows_per_chunk
from palu.models.lora import CausalLM
from palu.ops import topk_mse, weight_mean


class PaluMethod(Method):
    """``gamma * local + lambda_kl * kl + lambda_retain * retain``.

    The targets are the onset tokens, the others the ordinary ones; see :mod:`palu.losses` for the terms. Only rows
    with a role reach the head.
    """

    terms = ("local", "kl", "retain")
    ref_fields = (
        RefField("index", "targets"),  # int32 [onset, K]: the highest logits' indices
        RefField("scale", "targets"),  # [onset]: what the local loss is divided by
        RefField("hidden", "others"),  # [ordinary, d]: the last hidden state
    )
    needs_ref_head = True
    has_kl = True

    def __init__(self, model: CausalLM, config: UnlearnConfig):
        super().__init__(model, config)
        self.weight_mean: Tensor | None = None  # of a frozen head, once it is known

    @staticmethod
    def make_items(
        examples: Sequence[Example], alternates: Sequence[Example], config: UnlearnConfig, eos_token_id: int | None
    ) -> list[Item]:
        """Make the items of the forget set: its onset and its ordinary rows."""
        return forget_items(examples, config.n, eos_token_id)

    @staticmethod
    def reference_fn(ref_head: Head, config: UnlearnConfig) -> ReferenceFn:
        """Return the function that ranks logits at onset rows and keeps the hidden states of ordinary rows."""
        k = min(config.top_k, ref_head.weight.shape[0])
        rows = rows_per_chunk(ref_head, config.chunk_bytes)

        def reference_fields(states: RefRows) -> dict[str, Tensor]:
            chunks = [_highest(ref_head.logits(chunk), k, config) for chunk in states.targets.split(rows)]
            index, scale = map(torch.cat, zip(*chunks, strict=True))
            return {"index": index, "scale": scale, "hidden": states.others}

        return reference_fields

    @staticmethod
    def cache_settings(config: UnlearnConfig) -> dict[str, Any]:
        """Return K, and the local loss's target where it is normalised."""
        return {"top_k": config.top_k, "target": config.target if config.normalize else None}

    def compute_losses(self, hidden: Tensor, head: Head, batch: Batch, shares: Shares) -> tuple[Tensor, Tensor]:
        """Compute (total, [local, kl, retain])."""
        config, counts = self.config, batch.counts
        if self.weight_mean is None and head.softcap is None and not head_of(self.model).weight.requires_grad:
            self.weight_mean = weight_mean(head.weight)
        gamma, lambda_kl, lambda_retain = config.weights
        scale = batch.reference["scale"].to(shares.targets.dtype)  # a float64 reference beside a float32 model
        row_weight = torch.cat(
            [
                (gamma * shares.targets).expand(counts.targets) / scale,
                (lambda_kl * shares.others).expand(counts.others),
                (lambda_retain * shares.retain).expand(counts.retain),
            ]
        )
        terms = (
            LocalTerm(batch.reference["index"], config.target),
            KLTerm(batch.reference["hidden"], self.ref_head or head, reverse=config.kl_direction == "reverse"),
            CrossEntropyTerm(batch.labels[counts.targets + counts.others :]),
        )
        total, losses = fused_linear_losses(
            hidden, head, terms, row_weight, chunk_bytes=config.chunk_bytes, weight_mean=self.weight_mean
        )
        local, kl, retain = losses.split([counts.targets, counts.others, counts.retain])
        sums = torch.stack([(local / scale).sum(), kl.sum(), retain.sum()])
        return total, sums * torch.stack(shares[:3])


def _highest(logits: Tensor, k: int, config: UnlearnConfig) -> tuple[Tensor, Tensor]:
    """Find the indices of the K highest of the logits [r, V], and their local loss (1 if not normalised)."""
    index = logits.topk(k, dim=-1, sorted=False).indices.int()
    if not config.normalize:
        return index, logits.new_ones(len(logits))
    loss = topk_mse(logits, index, config.target)
    return index, loss.where(loss > 0, 1)  # K = 1 with the local mean has nothing to flatten
