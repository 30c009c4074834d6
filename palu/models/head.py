"""The output layer of a causal language model: reach it, and evaluate its logits in chunks of rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from palu.eager import acc_dtype
from palu.models.lora import CausalLM, base_of

# Fields of transformers' text configurations by which a model changes what its output layer gives (MiniCPM3 and
# Inkling: what it is given, which without a bias is the same). Scales come before a cap. Found in the modeling files
# of transformers 5.24.
HEAD_FIELDS: dict[str, Literal["cap", "multiply", "divide"]] = {
    "final_logit_softcapping": "cap",  # Gemma 2, 3, 3n and 4, VaultGemma, NanoChat, Beam, Inkling 2, Muse
    "logits_soft_cap": "cap",  # RecurrentGemma
    "output_logit_soft_cap": "cap",  # xLSTM
    "logit_scale": "multiply",  # Cohere
    "lm_head_multiplier": "multiply",  # Falcon-H1
    "output_multiplier": "multiply",  # Muse
    "logits_scaling": "divide",  # Granite, MiniCPM3
    "logits_mup_width_multiplier": "divide",  # Inkling
}
ALIGNED = ("cuda",)  # kinds of device on which logits are padded
_MULTIPLIES_BY_LOGITS_SCALING = "hyperclovax"  # a model type: Granite's field, used the other way round


class Head(NamedTuple):
    """An output layer: logits = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap), or without the cap.

    The scale is multiplied into hidden states and bias, in which the mean over the vocabulary stays linear. A power of
    two, as most models have, is exact. Any other rounds each hidden state once more; in a logit these errors come to
    what rounding that logit does, which scaling the logits instead would do.
    """

    weight: Tensor  # [V, d]
    bias: Tensor | None  # [V]
    scale: float = 1.0
    softcap: float | None = None

    def scaled(self, values: Tensor) -> Tensor:
        """Multiply hidden states or the bias by the scale."""
        return values if self.scale == 1 else values * self.scale

    def product(self, hidden: Tensor, linear: Callable[..., Tensor] = F.linear) -> Tensor:
        """Compute the scaled logits before the cap [..., V] from hidden states [..., d], in the weight's dtype."""
        bias = None if self.bias is None else self.scaled(self.bias)
        return linear(self.scaled(hidden).to(self.weight.dtype), self.weight, bias)

    def logits(self, hidden: Tensor) -> Tensor:
        """Compute logits [..., V] from last hidden states [..., d], with gradient: float32, of float64 float64."""
        logits = self.product(hidden)
        logits = logits.to(acc_dtype(logits.dtype))
        if self.softcap is None:
            return logits
        logits = logits / self.softcap
        return logits.tanh_() * self.softcap


def aligned_linear(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute logits [R, V] whose rows begin at multiples of 16 bytes on a GPU, without gradient.

    Where V is no multiple of that (50257, 32001), neither torch's products nor palu's kernels could move 16 bytes at a
    time otherwise. On other devices it is ``F.linear``.
    """
    pack = 16 // weight.element_size()
    vocab_size = len(weight)
    if weight.device.type not in ALIGNED or vocab_size % pack == 0:
        return F.linear(hidden, weight, bias)
    logits = hidden.new_empty(len(hidden), -(-vocab_size // pack) * pack)[:, :vocab_size]
    if bias is None:
        return torch.mm(hidden, weight.t(), out=logits)
    return torch.addmm(bias, hidden, weight.t(), out=logits)


def body_of(model: CausalLM) -> nn.Module:
    """Return the decoder without its head."""
    return base_of(model).get_decoder()


def layers_of(body: Any) -> list[nn.Module]:
    """Return the layers of a body in their order; none where they are not found."""
    count = body.config.get_text_config().num_hidden_layers
    lists = [part for part in body.children() if isinstance(part, nn.ModuleList) and len(part) == count]
    return list(lists[0]) if len(lists) == 1 else []


def head_of(model: CausalLM) -> Head:
    """Return the output layer with its configuration's scale and cap; ValueError where one is no positive number."""
    base = base_of(model)
    config: Any = base.config.get_text_config()
    scale, softcap = 1.0, None
    for field, use in HEAD_FIELDS.items():
        value = getattr(config, field, None)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, Real) or not 0 < float(value) < math.inf:
            raise ValueError(
                f"{field} = {value!r} in the configuration of {type(base).__name__}: palu reads it as what the logits "
                "are scaled by or capped at, and knows positive numbers only"
            )
        if use == "cap":
            softcap = float(value)
        elif use == "multiply" or (field == "logits_scaling" and config.model_type == _MULTIPLIES_BY_LOGITS_SCALING):
            scale *= float(value)
        else:
            scale /= float(value)
    layer = base.get_output_embeddings()
    return Head(layer.weight, getattr(layer, "bias", None), scale, softcap)


def rows_per_chunk(head: Head, chunk_bytes: int) -> int:
    """Return how many rows of float32 logits (while they are capped, two of each) fit into it; at least one."""
    copies = 1 if head.softcap is None else 2
    return max(chunk_bytes // (head.weight.shape[0] * 4 * copies), 1)


@torch.no_grad()
def map_logits(
    function: Callable[[Tensor, Tensor], Tensor], hidden: Tensor, head: Head, labels: Tensor, chunk_bytes: int
) -> Tensor:
    """Apply a function of logits [r, V] and labels [r], to [r, ...], to chunks of rows with hidden states [R, d]."""
    rows = rows_per_chunk(head, chunk_bytes)
    chunks = zip(hidden.split(rows), labels.split(rows), strict=True)
    return torch.cat([function(head.logits(h), label) for h, label in chunks])


def cross_entropy(hidden: Tensor, head: Head, labels: Tensor, chunk_bytes: int) -> Tensor:
    """Compute the mean cross-entropy of rows with hidden states [R, d] and labels [R], with gradient, in any dtype.

    The logits of one chunk of rows are held at a time; those of the backward pass are computed again.
    """

    def of_chunk(hidden: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(head.logits(hidden), labels, reduction="sum")

    rows = rows_per_chunk(head, chunk_bytes)
    chunks = zip(hidden.split(rows), labels.split(rows), strict=True)
    sums = [checkpoint(of_chunk, h, label, use_reentrant=False) for h, label in chunks]
    return torch.stack(sums).sum() / len(labels)


def nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute -log P(label) of each row, [R], from logits [R, V] and labels [R]."""
    return F.cross_entropy(logits, labels, reduction="none")


class GradientSum:
    """Adds up a gradient of the head, part by part; in float32 where several parts are bfloat16 or float16.

    Otherwise the parts are added to each other in the buffer that is the result.
    """

    def __init__(self, like: Tensor, several: bool):
        self.part = like.new_empty(like.shape)
        half = like.dtype in (torch.bfloat16, torch.float16)
        self.total = like.new_zeros(like.shape, dtype=torch.float32) if half and several else None
        self.filled = False  # whether ``part`` holds anything

    def _next(self) -> bool:
        """Add the last part to the total; whether the next one is to be added to what the buffer holds."""
        filled, self.filled = self.filled, True
        if self.total is None:
            return filled
        if filled:
            # On a CPU torch converts the whole addend first: block by block that is a megabyte.
            block = 2**18 if self.part.device.type == "cpu" else self.part.numel()
            for total, part in zip(self.total.view(-1).split(block), self.part.view(-1).split(block), strict=True):
                total += part
        return False

    def add_product(self, a: Tensor, b: Tensor) -> None:
        """Add ``a @ b``."""
        if self.total is not None and self.total.is_cuda and torch.version.cuda:  # whose products add to float32
            torch.addmm(self.total, a, b, torch.float32, out=self.total)
            return
        torch.addmm(self.part, a, b, beta=int(self._next()), out=self.part)

    def buffer(self) -> Tensor:
        """Return a buffer of the parts' dtype, to which the next part is to be added."""
        return self.part if self._next() else self.part.zero_()

    def result(self, dtype: torch.dtype) -> Tensor:
        """Return the sum for a leaf of this dtype: rounded once, if that is the parts' (under autocast it is not)."""
        filled = self._next()
        if self.total is None:
            return self.part if filled else self.part.zero_()
        return self.part.copy_(self.total) if dtype == self.part.dtype else self.total
