"""Quantised models: which ones are accepted, and what of them tells one from another.

Quantised weights are frozen, so such a model is trained through a LoRA adapter alone (QLoRA, arXiv 2305.14314), and its
head must be left as it was. bitsandbytes is not needed, and not imported, for other models.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from palu.models.lora import CausalLM, base_of, is_peft
from palu.models.root import is_on


def quantized_by(model: CausalLM) -> str | None:
    """Return the method by which a model's weights are quantised, such as "bitsandbytes"; None: they are not."""
    base: Any = base_of(model)
    if not getattr(base, "is_quantized", False):
        return None
    method = getattr(base, "quantization_method", "an unknown method")
    return str(getattr(method, "value", method))


def quantized_layers(base: PreTrainedModel) -> Iterator[tuple[str, Any]]:
    """Yield the layers that bitsandbytes has quantised, with their paths."""
    bnb: Any = sys.modules.get("bitsandbytes")  # whoever holds such a layer has imported it
    kinds = () if bnb is None else (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)
    yield from ((path, module) for path, module in base.named_modules() if isinstance(module, kinds))


def quantized_state(base: PreTrainedModel) -> dict[str, Tensor]:
    """Return the weights that bitsandbytes has quantised, with what turns them back into numbers."""
    states = (layer.state_dict(prefix=f"{path}.") for path, layer in quantized_layers(base))
    return {name: value for state in states for name, value in state.items()}


def check_placement(name: str, base: PreTrainedModel) -> None:
    """Raise ValueError where a model is spread over devices, or its head is quantised.

    On CPUs with AVX512-BF16 bitsandbytes lays 4-bit weights out again in the first pass without gradients. Later passes
    give no gradients through such weights, without a word: this is switched off.
    """
    devices = sorted({str(device) for device in (getattr(base, "hf_device_map", None) or {}).values()})
    if len(devices) > 1:
        raise ValueError(
            f"{name} is spread over the devices {', '.join(devices)} by its device_map; load it on one device "
            "(device_map={'': 0}), or leave device_map out and shard it with FSDP2 (docs/processes.md)"
        )
    head: Any = base.get_output_embeddings()
    if quantized_by(base) and not (type(head.weight) is nn.Parameter and head.weight.is_floating_point()):
        path = next(path for path, module in base.named_modules() if module is head)
        raise ValueError(
            f"the head of {name} is quantised, while PALU's losses need its numbers; leave it out: "
            f"llm_int8_skip_modules=[{path!r}] in the BitsAndBytesConfig"
        )
    for _, layer in quantized_layers(base):
        layer.support_avx512bf16_for_cpu = False


def check_quantized(name: str, model: CausalLM, device: torch.device, *, trained: bool, sharded: bool) -> None:
    """Raise ValueError where a quantised model cannot take part in a run; see :func:`palu.models.checks.check_models`.

    ``name``: "model" or "ref_model", for the messages. ``trained``: whether it is the one to train.
    """
    method, base = quantized_by(model), base_of(model)
    if method is None:
        return
    if method != "bitsandbytes":  # gradients through the layers of others, and their fingerprints, have not been tried
        raise ValueError(
            f"{name} is quantised by {method}, while palu works with bitsandbytes: load it with a BitsAndBytesConfig "
            "(load_in_4bit or load_in_8bit), or without a quantization_config"
        )
    if trained and not is_peft(model):
        raise ValueError(
            f"{name} is quantised, and quantised weights cannot be trained; add a LoRA adapter (docs/lora.md), "
            "or load it without a quantization_config"
        )
    if sharded:
        raise ValueError(
            f"{name} is quantised, and its weights cannot be sharded by FSDP2 or DeepSpeed; use DDP or one process"
        )
    if not is_on(base, device):
        raise ValueError(
            f"{name} is quantised and on {base.device}, while the run is on {device}; load it there: "
            f"device_map={{'': '{device}'}}"
        )
    states = (getattr(layer.weight, "quant_state", None) for _, layer in quantized_layers(base))
    if any(getattr(state, "packing_format_for_cpu", False) for state in states):
        raise ValueError(
            f"the 4-bit weights of {name} were laid out again by a pass on this CPU, and gradients do not go through "
            "them any more; load it again, and run it in palu first"
        )
