"""Attention within each example of a packed row, without a [T, T] mask.

transformers' own SDPA path masks a packed row with a dense block-causal mask: correct, but every token is
multiplied with every other. Registered here as ``"palu_packed"``: torch's variable-length FlashAttention for half
types on CUDA, one causal call per example on a CPU. Elsewhere (float32 on CUDA, where a call per example would cost
more in launches than it saves) and for models set to another implementation, transformers' own path stays.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, PreTrainedModel

_VARLEN_HAS_GQA = "enable_gqa" in inspect.signature(varlen_attn).parameters


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    sequence_lengths: tuple[int, ...],
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend causally within each example.

    Args:
        query: [1, H, T, D]; key, value: [1, H_kv, T, D].
        cu_seq_lens_q: [examples + 1], int32, where each example begins and the last ends.
        max_length_q: length of the longest example.
        sequence_lengths: length of each example; they add up to T.

    Returns:
        ([1, T, H, D], None), as transformers' attention functions do.
    """
    if query.is_cuda:
        if torch.is_autocast_enabled("cuda"):  # rotary embeddings are computed in float32
            query, key, value = (x.to(torch.get_autocast_dtype("cuda")) for x in (query, key, value))
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        gqa: dict[str, Any] = {"enable_gqa": True} if _VARLEN_HAS_GQA else {}
        if not gqa:
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        out: Any = varlen_attn(
            q,
            k,
            v,
            cu_seq_lens_q,
            cu_seq_lens_q,
            max_length_q,
            max_length_q,
            scale=scaling,
            window_size=(-1, 0),
            **gqa,
        )
        return out[None], None
    parts = (x.split(sequence_lengths, dim=2) for x in (query, key, value))
    joined = torch.cat(
        [
            F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
            for q, k, v in zip(*parts, strict=True)
        ],
        dim=2,
    )
    return joined.transpose(1, 2).contiguous(), None


AttentionInterface.register("palu_packed", packed_attention)


@contextmanager
def use_packed_attention(model: PreTrainedModel, mixed_precision: str = "no") -> Iterator[None]:
    """Switch a model from SDPA to :func:`packed_attention` within the block, where that can serve it.

    ``mixed_precision`` is accelerate's: "no", "bf16" or "fp16".
    """
    half = mixed_precision != "no" or model.dtype in (torch.float16, torch.bfloat16)
    served = model.device.type == "cpu" or (model.device.type == "cuda" and half)
    if not served or model.config._attn_implementation != "sdpa" or getattr(model.config, "attention_dropout", 0.0):
        yield
        return
    model.set_attn_implementation("palu_packed")
    try:
        yield
    finally:
        model.set_attn_implementation("sdpa")
