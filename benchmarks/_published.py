"""The published formulation of PALU (arXiv 2601.03190), as its authors shipped it: what the benchmarks compare with.

Three passes a step: the model on the forget batch, the frozen reference on the forget batch, the model
on the retain batch, each padded and each with logits [B, T, V] at every position. The top K of the
reference, the means and the KL divergence are computed at every position too, and the roles pick from
the results. Nothing here is from palu but the plain-torch prefix mask and the settings.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from palu.config import UnlearnConfig
from palu.data.tokenize import IGNORE, ORDINARY, Example
from palu.eager import prefix_mask

Padded = dict[str, Tensor]  # input_ids, attention_mask and labels (as in palu.data), int64 [B, T]


def collate(examples: Sequence[Example]) -> Padded:
    """Pad examples on the right to one length."""
    ids, labels = [e.input_ids for e in examples], [e.labels for e in examples]
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(i) for i in ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE),
    }


def published_loss(
    logits: Tensor,
    ref_logits: Tensor,
    labels: Tensor,
    retain_logits: Tensor,
    retain_labels: Tensor,
    config: UnlearnConfig,
    eos_token_id: int | None,
) -> Tensor:
    """Compute gamma * local + lambda_kl * kl + lambda_retain * retain from logits [B, T, V] and labels [B, T].

    The target of the local loss is the mean of the current logits over the vocabulary, with gradient.
    """
    onset = prefix_mask(labels, config.method.n, eos_token_id)[:, 1:]
    ordinary = labels[:, 1:] == ORDINARY
    current, frozen = logits[:, :-1], ref_logits[:, :-1]

    index = frozen.topk(min(config.method.top_k, frozen.shape[-1]), dim=-1).indices
    distance = current.gather(-1, index) - current.mean(-1, keepdim=True)
    local = _mean(distance.square().mean(-1)[onset])

    log_p, log_q = current.log_softmax(-1), frozen.log_softmax(-1)
    if config.method.kl_direction == "reverse":
        log_p, log_q = log_q, log_p
    kl = _mean(F.kl_div(log_p, log_q, log_target=True, reduction="none").sum(-1)[ordinary])

    # As transformers computes it: in float32 at least.
    scores = retain_logits.to(torch.promote_types(retain_logits.dtype, torch.float32))
    shifted = retain_labels[:, 1:].flatten()
    retain = F.cross_entropy(scores[:, :-1].flatten(0, 1), shifted, ignore_index=IGNORE)
    weights = config.method
    return weights.gamma * local + weights.lambda_kl * kl + weights.lambda_retain * retain


def _mean(values: Tensor) -> Tensor:
    return values.sum() / max(values.numel(), 1)


def published_step(
    model: PreTrainedModel,
    ref_model: PreTrainedModel,
    forget: Padded,
    retain: Padded,
    config: UnlearnConfig,
    eos_token_id: int | None,
) -> Tensor:
    """Compute the loss of a step, with gradient; everything is on the models' device."""

    def logits(of: PreTrainedModel, batch: Padded) -> Tensor:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        return of(**inputs, use_cache=False).logits

    current = logits(model, forget)
    with torch.no_grad():
        ref_logits = logits(ref_model, forget)
    of_retain = logits(model, retain)
    return published_loss(current, ref_logits, forget["labels"], of_retain, retain["labels"], config, eos_token_id)
