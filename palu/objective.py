"""The training objective as one module: batch in, loss out, so that DDP, FSDP and DeepSpeed see one forward."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from palu.config import UnlearnConfig
from palu.losses import CrossEntropyTerm, Head, KLTerm, LocalTerm, head_losses
from palu.ops import weight_mean
from palu.packing import Batch
from palu.reference import acc_dtype


class Losses(NamedTuple):
    """What a forward of :class:`PaluObjective` returns; only ``total`` has a gradient."""

    total: Tensor  # gamma * local + lambda_kl * kl + lambda_retain * retain
    terms: Tensor  # [3]: local, kl, retain, each divided by the token counts given
    onset_probability: Tensor  # highest probability of a true token at an onset row; NaN when not asked for


class PaluObjective(nn.Module):
    """The PALU loss of a causal language model on packed batches (arXiv 2601.03190).

    The body runs once over forget and retain examples; only rows with a role reach the head.

    Args:
        model: a causal language model whose logits are ``output_embeddings(body(...))``.
        ref_head: the frozen reference's head; the model's own where that is frozen.
        config: the settings; ``stop_probability`` decides whether onset probabilities are computed.
    """

    def __init__(self, model: PreTrainedModel, ref_head: Head, config: UnlearnConfig):
        super().__init__()
        self.model = model
        self.ref_head = ref_head
        self.config = config
        head = head_of(model)
        self.weight_mean = None if head.weight.requires_grad else weight_mean(head.weight)

    def forward(self, batch: Batch, token_counts: Tensor) -> Losses:
        """Losses of a micro-batch.

        Args:
            batch: on the model's device.
            token_counts: [3], float: onset, ordinary and retain tokens of the whole optimisation step, by which
                the sums over this micro-batch are divided; a 0 counts as 1.
        """
        config = self.config
        states = body_of(self.model)(**batch.packed.inputs()).last_hidden_state[0]
        hidden = states.index_select(0, batch.rows)
        head = head_of(self.model)

        counts = batch.counts
        per_token = token_counts.to(acc_dtype(hidden.dtype)).clamp(min=1).reciprocal()
        weights = config.gamma, config.lambda_kl, config.lambda_retain
        row_weight = torch.cat([(w * share).expand(n) for w, share, n in zip(weights, per_token, counts, strict=True)])
        terms = (
            LocalTerm(batch.index, config.target),
            KLTerm(batch.ref_hidden, self.ref_head, reverse=config.kl_direction == "reverse"),
            CrossEntropyTerm(batch.retain_labels),
        )
        total, losses = head_losses(
            hidden,
            head,
            terms,
            row_weight,
            chunk_bytes=config.chunk_bytes,
            weight_mean=self.weight_mean,
        )
        sums = torch.stack([part.sum() for part in losses.split(counts)])
        return Losses(total, sums * per_token, self._onset_probability(hidden[: counts[0]], head, batch.onset_labels))

    @torch.no_grad()
    def _onset_probability(self, hidden: Tensor, head: Head, labels: Tensor) -> Tensor:
        if self.config.stop_probability is None:
            return hidden.new_full((), float("nan"), dtype=torch.float32)
        rows = max(self.config.chunk_bytes // (head.weight.shape[0] * 4), 1)
        highest = hidden.new_zeros((), dtype=torch.float32)
        for h, y in zip(hidden.split(rows), labels.split(rows), strict=True):
            log_p = -F.cross_entropy(F.linear(h, *head).float(), y, reduction="none")
            highest = torch.cat([highest[None], log_p.exp()]).max()
        return highest


def body_of(model: PreTrainedModel) -> nn.Module:
    """The decoder without its head."""
    return model.get_decoder()


def head_of(model: PreTrainedModel) -> Head:
    """The output layer's weight [V, d] and bias."""
    layer = model.get_output_embeddings()
    return Head(layer.weight, getattr(layer, "bias", None))
