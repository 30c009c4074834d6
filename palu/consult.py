"""Consulting the reference: all that it will ever be asked, before the first step."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from accelerate import Accelerator

from palu.adapter import CausalLM, base_of, without_adapter
from palu.anchors import Everyday, write_anchors
from palu.attention import using_packed_attention
from palu.cache import ReferenceCache, build_cache, read_cache
from palu.cache_file import CacheFile
from palu.config import UnlearnConfig
from palu.decoding import evaluating
from palu.losses import Head
from palu.objective import Objective, body_of, head_of
from palu.packing import Item
from palu.processes import autocast, everywhere, together


def consult(
    ref_model: CausalLM,
    model: CausalLM,
    items: Sequence[Item],
    everyday: Everyday,
    method: type[Objective],
    config: UnlearnConfig,
    accelerator: Accelerator,
    *,
    file: CacheFile | None = None,
    progress: bool = False,
) -> tuple[ReferenceCache, Head | None]:
    """Have the reference write the anchors and answer what the method asks; return that, and its head if it is needed.

    Where a file holds its answers it is not asked again. Where the reference is the model itself, it speaks without its
    adapter, if it has one. Its body is sent back to where it was. All processes must call it.

    Args:
        ref_model: the reference, perhaps the model itself.
        items: the forget set, as the method looks at it.
        everyday: the prompts to which anchors are written.
        file: where the answers are kept; ``None``: in memory.
        progress: show progress bars.

    Raises:
        CacheError: the file cannot be read or written.
        DataError: the reference answers none of the prompts.
    """
    if not method.needs_ref_head and method.ask(head_of(ref_model), config) is None:
        return build_cache(body_of(ref_model), accelerator.device, items, None), None
    own = ref_model is model
    home = ref_model.device
    with together(accelerator):
        cache = read_cache(file, items) if file is not None else None
    if not everywhere(cache is not None, accelerator):  # else all have found it
        anchors = write_anchors(ref_model, everyday, accelerator, adapter=not own, progress=progress)
        base = base_of(ref_model.to(accelerator.device))
        with (
            evaluating(base),
            autocast(accelerator),
            using_packed_attention(base, accelerator.mixed_precision),
            without_adapter(ref_model) if own else nullcontext(),
        ):
            ask = method.ask(head_of(ref_model), config)
            body = body_of(ref_model)
            cache = build_cache(body, accelerator.device, items, ask, anchors=anchors, file=file, progress=progress)
    assert cache is not None
    head = _head(ref_model, own, accelerator) if method.needs_ref_head else None
    if not own:
        ref_model.to(home)  # type: ignore[arg-type]
    return cache, head


def _head(ref_model: CausalLM, own: bool, accelerator: Accelerator) -> Head:
    """Only a head that training will change, or that mixed precision wants in another dtype, is copied."""
    weight, bias = head_of(ref_model)
    will_change = own and weight.requires_grad
    dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else weight.dtype
    return Head(
        weight.detach().to(accelerator.device, dtype, copy=will_change),
        None if bias is None else bias.detach().to(accelerator.device, dtype, copy=will_change),
    )
