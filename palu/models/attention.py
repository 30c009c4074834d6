"""Attention within each example of a packed sequence, without a [T, T] mask.

transformers' own SDPA path masks a packed sequence with a dense block-causal mask: correct, but every token is
multiplied with every other. Registered here as ``"palu_packed"``: torch's variable-length FlashAttention for half
types on CUDA, one causal call per example on a CPU, with the layer's sliding window where it has one. On a CPU examples
that begin alike may share that part, which then runs once. Under autocast on a CPU short examples attend in float32,
which is faster there than bfloat16. Elsewhere (float32 on CUDA, where a call per example would cost more in launches
than it saves) and for models set to another implementation, transformers' own path stays.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

# On a CPU torch's attention takes three times as long in bfloat16 as in float32 at 60 tokens an example, and as
# long at 400 (benchmarks/README.md).
FLOAT32_TOKENS = 256

_GQA: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}

# For models whose layers are all full attention no mask is made. For the others transformers makes those that are
# not plainly causal: a layer that does not say its window (Qwen2-MoE, PhiMoE), or has chunks (Llama 4), needs them.
# That costs a bool [T, T] a pass where the row is longer than the window, and a wait for the GPU.
PLAIN, MASKED = "palu_packed", "palu_packed_masked"
_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}

# Models that do not hand on to their attention what they are called with, such as where each example begins.
_HANDS_NOTHING_ON = {"falcon"}

# What transformers' models may give to an attention function beside a mask and a window, to other scores than
# q k^T * scaling.
_OTHER_SCORES = ("position_bias", "softcap", "s_aux", "sinks", "indices", "block_indices")


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    sequence_lengths: tuple[int, ...],
    shared_lengths: tuple[int, ...],
    leader: int,
    **other: Any,
) -> tuple[Tensor, None]:
    """Attend causally within each example; a token sees itself and the ``sliding_window - 1`` tokens before it.

    A layer that masks what no window describes, asks for other scores or drops some (GPT-2 in training), gets
    transformers' SDPA, with the mask.

    Args:
        query: [1, H, T, D]; key, value: [1, H_kv, T, D]; the result: [1, T, H, D], and None.
        attention_mask: [1, 1, T, T], bool, or None: causal within each example. With a window it says no more.
        sliding_window: in tokens; None: the example's beginning is the border.
        cu_seq_lens_q: [examples + 1], int32, where each example begins and the last ends.
        max_length_q, sequence_lengths: the longest example's length, and that of each; they add up to T.
        shared_lengths, leader: how many of the first tokens of the leader each example goes on from, in place of
            tokens of its own; other than 0 on a CPU alone.
    """
    masked = attention_mask is not None and sliding_window is None
    if masked or other.get("dropout") or any(other.get(name) is not None for name in _OTHER_SCORES):
        if attention_mask is None:
            blocks = [_band(length, length, sliding_window, query.device) for length in sequence_lengths]
            attention_mask = torch.block_diag(*blocks).bool()[None, None]
            starts = [*accumulate(sequence_lengths, initial=0)]
            for start, length, shared in zip(starts, sequence_lengths, shared_lengths, strict=False):
                seen = _band(length, shared + length, sliding_window, query.device)[:, :shared]
                attention_mask[..., start : start + length, starts[leader] : starts[leader] + shared] |= seen
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **other)
    if query.is_cuda:
        if torch.is_autocast_enabled("cuda"):  # rotary embeddings are computed in float32
            query, key, value = (x.to(torch.get_autocast_dtype("cuda")) for x in (query, key, value))
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        if not _GQA:
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        # As in FlashAttention: how many tokens to the left and to the right of itself a token sees.
        window = (-1 if sliding_window is None or sliding_window >= max_length_q else sliding_window - 1), 0
        borders = cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q
        out: Any = varlen_attn(q, k, v, *borders, scale=scaling, window_size=window, **_GQA)
        return out[None], None
    halves = torch.is_autocast_enabled("cpu") and query.dtype != torch.float64  # which autocast leaves alone
    in_float32 = halves and max_length_q <= FLOAT32_TOKENS
    qkv = [x.float() if in_float32 else x for x in (query, key, value)]
    queries, *parts = (x.split(sequence_lengths, dim=2) for x in qkv)
    keys, values = (
        [torch.cat([x[leader][:, :, :n], own], dim=2) if n else own for own, n in zip(x, shared_lengths, strict=True)]
        for x in parts
    )
    with torch.autocast("cpu", enabled=False) if in_float32 else nullcontext():
        examples = [
            F.scaled_dot_product_attention(q, k, v, scale=scaling, enable_gqa=True, **_mask(q, k, sliding_window))
            for q, k, v in zip(queries, keys, values, strict=True)
        ]
    return torch.cat(examples, dim=2).transpose(1, 2).contiguous(), None


def _mask(query: Tensor, key: Tensor, window: int | None) -> dict[str, Any]:
    """Return SDPA's arguments for an example: a mask only where the window binds, or it goes on from the leader."""
    length, seen = query.shape[2], key.shape[2]
    if length == seen and (window is None or window >= length):
        return {"is_causal": True}
    return {"attn_mask": _band(length, seen, window, query.device)}


def _band(length: int, seen: int, window: int | None, device: torch.device) -> Tensor:
    """Mark which tokens (columns) each of the last ``length`` of ``seen`` sees: bool [length, seen]."""
    causal = torch.ones(length, seen, dtype=torch.bool, device=device).tril(seen - length)
    return causal if window is None else causal.triu(seen - length + 1 - window)


def _mask_of_model(*, local_size: int | None = None, use_vmap: bool = False, **arguments: Any) -> Any:
    """Make a mask as transformers does for SDPA, but none where it would be causal within each example."""
    if local_size is None and not use_vmap:  # neither a window or a chunk, nor a rule that the model adds
        return None
    return sdpa_mask(local_size=local_size, use_vmap=use_vmap, **arguments)


AttentionInterface.register(PLAIN, packed_attention)
AttentionInterface.register(MASKED, packed_attention)
AttentionMaskInterface.register(MASKED, _mask_of_model)


@contextmanager
def use_packed_attention(model: PreTrainedModel, mixed_precision: str = "no") -> Iterator[None]:
    """Switch a model from SDPA to :func:`packed_attention` within the block, where that can serve it."""
    half = mixed_precision != "no" or model.dtype in (torch.float16, torch.bfloat16)
    served = model.device.type == "cpu" or (model.device.type == "cuda" and half)
    config: Any = model.config.get_text_config()
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    served = served and layers <= _LAYERS and not getattr(model.config, "attention_dropout", 0.0)
    served = served and config.model_type not in _HANDS_NOTHING_ON
    plain = layers == {"full_attention"} and getattr(config, "sliding_window", None) is None
    now = model.config._attn_implementation
    with _attention(model, now if not served or now != "sdpa" else PLAIN if plain else MASKED):
        yield


def shares_prefix(model: PreTrainedModel) -> bool:
    """Whether :func:`use_packed_attention` lets examples share a beginning: on a CPU, without transformers' masks."""
    if model.device.type != "cpu":
        return False
    with use_packed_attention(model):
        return model.config._attn_implementation == PLAIN


@contextmanager
def use_own_attention(model: PreTrainedModel) -> Iterator[None]:
    """Undo :func:`use_packed_attention` within the block, so that the model takes any input and can generate."""
    now = model.config._attn_implementation
    with _attention(model, "sdpa" if now in (PLAIN, MASKED) else now):
        yield


@contextmanager
def _attention(model: PreTrainedModel, name: str) -> Iterator[None]:
    before = model.config._attn_implementation
    if name != before:
        model.set_attn_implementation(name)
    try:
        yield
    finally:
        if name != before:
            model.set_attn_implementation(before)
