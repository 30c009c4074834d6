"""PALU (arXiv 2601.03190): a local loss on onset tokens, KL on ordinary ones, cross-entropy on the retain set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from palu.config import UnlearnConfig
from palu.data.packing import Batch, Items, forget_items
from palu.data.tokenize import Example
from palu.losses import CrossEntropyTerm, KLTerm, LocalTerm, Term, UnlikelihoodTerm, fused_linear_losses
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
        RefField("index", "targets"),  # topk_mse: int32 [onset, K]: the highest logits' indices
        RefField("scale", "targets"),  # topk_mse: [onset]: what the loss is divided by
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
    ) -> Items:
        """Make the items of the forget set: its onset and its ordinary rows, where a term or a figure reads them."""
        gamma, lambda_kl, _ = config.weights
        return forget_items(
            examples,
            config.n,
            eos_token_id,
            onset=gamma > 0 or config.stop_probability is not None,
            most_ordinary=config.kl_rows if lambda_kl > 0 else 0,
            seed=config.seed,
        )

    @staticmethod
    def uses_other_prompts(config: UnlearnConfig) -> bool:
        """Whether ``kl_prompt`` says so."""
        return config.kl_prompt == "other"

    @classmethod
    def used_ref_fields(cls, config: UnlearnConfig) -> tuple[RefField, ...]:
        """Return what the local loss reads, and what the KL does, where they have a weight."""
        gamma, lambda_kl, _ = config.weights
        read = {"targets": gamma > 0 and config.local_loss == "topk_mse", "others": lambda_kl > 0}
        return tuple(field for field in cls.ref_fields if read[field.rows])

    @classmethod
    def uses_ref_head(cls, config: UnlearnConfig) -> bool:
        """Whether the KL has a weight."""
        return config.lambda_kl > 0

    @staticmethod
    def reference_fn(ref_head: Head, config: UnlearnConfig) -> ReferenceFn:
        """Return the function that ranks logits at onset rows and keeps the hidden states of ordinary rows."""
        k = min(config.top_k, ref_head.weight.shape[0])
        rows = rows_per_chunk(ref_head, config.chunk_bytes)
        used = {field.name for field in PaluMethod.used_ref_fields(config)}

        def reference_fields(states: RefRows) -> dict[str, Tensor]:
            fields = {}
            if "index" in used:
                chunks = [_highest(ref_head.logits(chunk), k, config) for chunk in states.targets.split(rows)]
                fields["index"], fields["scale"] = map(torch.cat, zip(*chunks, strict=True))
            if "hidden" in used:
                fields["hidden"] = states.others.to(_product_dtype(states.others, ref_head))
            return fields

        return reference_fields

    @staticmethod
    def cache_settings(config: UnlearnConfig) -> dict[str, Any]:
        """Return the fields' names, and for the top K also K, and the loss's target where it is normalised."""
        names = [field.name for field in PaluMethod.used_ref_fields(config)]
        of_top_k = {"top_k": config.top_k, "target": config.target if config.normalize else None}
        return {"fields": names} | (of_top_k if "index" in names else {})

    def compute_losses(self, hidden: Tensor, head: Head, batch: Batch, shares: Shares) -> tuple[Tensor, Tensor]:
        """Compute (total, [local, kl, retain]). A term of weight 0 is not computed, and stands as 0."""
        config, counts, reference = self.config, batch.counts, batch.reference
        gamma, lambda_kl, lambda_retain = config.weights
        rows = hidden.split([counts.targets, counts.others, counts.retain])
        terms: dict[int, Term] = {}
        row_weight: dict[int, Tensor] = {}
        if gamma > 0:
            row_weight[0] = (gamma * shares.targets).expand(counts.targets)
            if config.local_loss == "unlikelihood":
                terms[0] = UnlikelihoodTerm(batch.labels[: counts.targets], config.probability_floor)
            else:
                if self.weight_mean is None and head.softcap is None and not head_of(self.model).weight.requires_grad:
                    self.weight_mean = weight_mean(head.weight)
                terms[0] = LocalTerm(reference["index"], config.target)
                row_weight[0] = row_weight[0] / reference["scale"].to(shares.targets.dtype)  # float64 beside float32
        if lambda_kl > 0:
            terms[1] = KLTerm(reference["hidden"], self.ref_head or head, reverse=config.kl_direction == "reverse")
            row_weight[1] = (lambda_kl * shares.others).expand(counts.others)
        if lambda_retain > 0:
            terms[2] = CrossEntropyTerm(batch.labels[counts.targets + counts.others :])
            row_weight[2] = (lambda_retain * shares.retain).expand(counts.retain)
        lengths = [len(weight) for weight in row_weight.values()]
        total, losses = fused_linear_losses(
            hidden if sum(lengths) == len(hidden) else torch.cat([hidden[:0], *(rows[i] for i in terms)]),
            head,
            tuple(terms.values()),
            torch.cat([shares.targets.new_empty(0), *row_weight.values()]),
            chunk_bytes=config.chunk_bytes,
            weight_mean=self.weight_mean,
        )
        means = losses.new_zeros(3)
        for (i, weight), part in zip(row_weight.items(), losses.split(lengths), strict=True):
            means[i] = (weight * part).sum() / config.weights[i]
        return total, means


def _product_dtype(hidden: Tensor, head: Head) -> torch.dtype:
    """Return the dtype in which the head multiplies hidden states."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.weight.dtype


def _highest(logits: Tensor, k: int, config: UnlearnConfig) -> tuple[Tensor, Tensor]:
    """Find the indices of the K highest of the logits [r, V], and their local loss (1 if not normalised)."""
    index = logits.topk(k, dim=-1, sorted=False).indices.int()
    if not config.normalize:
        return index, logits.new_ones(len(logits))
    loss = topk_mse(logits, index, config.target)
    return index, loss.where(loss > 0, 1)  # K = 1 with the local mean has nothing to flatten
