"""The output layer of a causal language model: reach it, and evaluate its logits in chunks of rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from palu.eager import acc_dtype
from palu.models.lora import CausalLM, base_of


class Head(NamedTuple):
    """A linear output layer: logits = hidden @ weight.T + bias."""

    weight: Tensor  # [V, d]
    bias: Tensor | None  # [V]


def body_of(model: CausalLM) -> nn.Module:
    """Return the decoder without its head."""
    return base_of(model).get_decoder()


def head_of(model: CausalLM) -> Head:
    """Return the output layer's weight [V, d] and bias."""
    layer = base_of(model).get_output_embeddings()
    return Head(layer.weight, getattr(layer, "bias", None))


def rows_per_chunk(head: Head, chunk_bytes: int) -> int:
    """Return how many rows of float32 logits fit into ``chunk_bytes``; at least one."""
    return max(chunk_bytes // (head.weight.shape[0] * 4), 1)


@torch.no_grad()
def map_logits(
    function: Callable[[Tensor, Tensor], Tensor], hidden: Tensor, head: Head, labels: Tensor, chunk_bytes: int
) -> Tensor:
    """Apply a function of logits [r, V] and labels [r] to chunks of the rows with hidden states [R, d]: [R]."""
    rows = rows_per_chunk(head, chunk_bytes)
    chunks = zip(hidden.split(rows), labels.split(rows), strict=True)
    return torch.cat([function(to_acc_dtype(F.linear(h, *head)), label) for h, label in chunks])


def to_acc_dtype(logits: Tensor) -> Tensor:
    """Convert logits to the dtype of softmax and sums: float32, or float64 as they are."""
    return logits.to(acc_dtype(logits.dtype))


def nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute -log P(label) of each row, [R], from logits [R, V] and labels [R]."""
    return F.cross_entropy(logits, labels, reduction="none")
