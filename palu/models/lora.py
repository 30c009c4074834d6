"""LoRA adapters of PEFT: add one for a run, reach through a ``PeftModel``, switch its adapter off, check what it is.

PEFT is not imported for models that neither have nor get an adapter.
"""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, permutations
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from palu.quiet import silence_noise

if TYPE_CHECKING:
    from peft import PeftModel

CausalLM: TypeAlias = "PreTrainedModel | PeftModel"

# In the names of an adapter's parameters, before that of the adapter.
_OF_ADAPTER = r"\.(lora_\w+|modules_to_save|trainable_tokens_\w+)\."

# Initialisations that take from the base weights what they give to the adapter.
_TAKES_FROM_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


class UnsupportedModelError(TypeError):
    """The model, or its adapter, is of a kind that palu does not work with."""


def is_peft(model: Any) -> TypeGuard[PeftModel]:
    """Whether this is a ``peft.PeftModel``."""
    peft = sys.modules.get("peft")  # whoever holds such a model has imported it
    return peft is not None and isinstance(model, peft.PeftModel)


def base_of(model: Any) -> PreTrainedModel:
    """Return the model inside a ``PeftModel``, with the adapter's layers in it; any other model itself."""
    base: Any = model.get_base_model() if is_peft(model) else model
    return base


def original_name(name: str) -> str | None:
    """Return a parameter's name from before PEFT put adapters into the model; None for an adapter's own."""
    if re.search(_OF_ADAPTER, name):
        return None
    return re.sub(r"\.(base_layer|original_module)(?=\.)", "", name)


@contextmanager
def added_adapter(model: CausalLM, rank: int | None, seed: int) -> Iterator[CausalLM]:
    """Yield the model with a new LoRA adapter, which is merged into its weights at the end of the block.

    The adapter is on every linear layer of the body whose weight requires a gradient. A model that has an adapter, and
    one for which ``rank`` is None, is yielded as it is.

    Args:
        seed: draws the adapter's first weights: the same ones, so that a resumed run starts from them.
    """
    base: Any = model
    if rank is None or is_peft(model) or getattr(model, "_hf_peft_config_loaded", False):
        yield model
        return
    silence_noise()
    import peft

    head = base.get_output_embeddings()
    flags = [(p, p.requires_grad) for p in base.parameters()]
    layers = [
        name
        for name, layer in base.named_modules()
        if isinstance(layer, nn.Linear | Conv1D) and layer is not head and layer.weight.requires_grad
    ]
    if not layers:
        raise ValueError(f"lora_rank = {rank}: no linear layer of the model requires a gradient; give lora_rank=None")
    with torch.random.fork_rng({p.device for p, _ in flags if p.device.type == "cuda"}):
        torch.manual_seed(seed)
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=rank, target_modules=layers)
        adapted: Any = peft.get_peft_model(base, config).train(base.training)
    try:
        yield adapted
    finally:
        trained = any(p.is_meta or bool(p.any()) for name, p in adapted.named_parameters() if "lora_B" in name)
        adapted.merge_and_unload() if trained else adapted.unload()  # which leaves every bit as it was
        vars(base).pop("peft_config", None)
        for p, flag in flags:
            p.requires_grad_(flag)


@contextmanager
def without_adapter(model: CausalLM) -> Iterator[None]:
    """Disable the model's adapter within the block, if it has one."""
    if not is_peft(model):
        yield
        return
    # On leaving, PEFT makes the whole adapter trainable, whatever it was.
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        with model.disable_adapter():
            yield
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)


def unmerged_layers(body: nn.Module) -> list[Any]:
    """List a body's linear layers to whose output an active LoRA adapter adds; none where it is merged, or disabled."""
    modules: Iterator[Any] = body.modules()
    adapted = [layer for layer in modules if hasattr(layer, "lora_A") and isinstance(_inner(layer), nn.Linear)]
    return [
        layer
        for layer in adapted
        if not layer.merged and not layer.disable_adapters and set(layer.active_adapters) & set(layer.lora_A)
    ]


def adapter_settings(model: CausalLM) -> list[Any]:
    """List what, beside weights, decides what a model's adapters compute; empty where none is active."""
    settings = []
    modules: list[tuple[str, Any]] = list(base_of(model).named_modules())
    for path, layer in modules:
        if _inner(layer) is layer or getattr(layer, "disable_adapters", True):
            continue
        dropouts = getattr(layer, "lora_dropout", {})
        for adapter in layer.active_adapters:
            scale = getattr(layer, "scaling", {}).get(adapter)
            dropout = getattr(dropouts[adapter], "p", 0.0) if adapter in dropouts else None
            variant = type(getattr(layer, "lora_variant", {}).get(adapter)).__name__
            settings.append([path, adapter, scale, dropout, variant, sorted(layer.merged_adapters)])
    return settings


def separate(**models: CausalLM | None) -> dict[str, CausalLM]:
    """Return the models that are given, by name, each as it is alone; ValueError where that cannot be had.

    PEFT puts an adapter into its base in place. So for a base that is given beside its ``PeftModel``, the base without
    the adapter is returned: modules of its own, and the same weights.
    """
    given = {name: model for name, model in models.items() if model is not None}
    found = dict(given)
    for (name, model), (other, adapted) in permutations(given.items(), 2):
        if model is adapted or not is_peft(adapted) or base_of(model) is not base_of(adapted):
            continue
        if is_peft(model) or adapted.get_model_status().merged_adapters:
            raise ValueError(
                f"{name} and {other} share one base model, which has an adapter in it; load {name} on its own"
            )
        found[name] = _without_adapters(base_of(model))
    return found


def _without_adapters(base: PreTrainedModel) -> PreTrainedModel:
    """Copy a model's modules, but not its weights, and take out those that PEFT has put in.

    PEFT's own unload would leave copies of modules_to_save there.
    """
    tensors = chain(base.parameters(), base.buffers())
    bare = copy.deepcopy(base, {id(tensor): tensor for tensor in tensors})
    for path, module in list(bare.named_modules()):
        if (inner := _inner(module)) is not module:
            bare.set_submodule(path, inner)
    vars(bare).pop("peft_config", None)
    return bare


@contextmanager
def inputs_require_grad(base: PreTrainedModel) -> Iterator[None]:
    """Make the embeddings' output require a gradient within the block.

    A checkpointed layer whose input needs no gradient may pass none to its adapter (reentrant checkpoints do not).
    """
    hooks = getattr(base, "_require_grads_hooks", None)
    ours = base.get_input_embeddings().register_forward_hook(lambda module, given, output: output.requires_grad_())
    try:
        yield
    finally:
        ours.remove()
        # transformers adds hooks when checkpointing is switched on, and forgets those that were there before.
        if getattr(base, "_require_grads_hooks", None) is not hooks:
            base.disable_input_require_grads()
            base._require_grads_hooks = hooks or []


def check_adapter(name: str, model: Any) -> None:
    """Raise UnsupportedModelError or ValueError where a ``PeftModel`` does more than a body with LoRA and a head."""
    if not is_peft(model):
        return
    configs: dict[str, Any] = model.peft_config
    if not configs:
        raise ValueError(f"{name} is a {type(model).__name__} without any adapter; use get_base_model() of it")
    for config in configs.values():
        kind = getattr(config.peft_type, "value", config.peft_type)
        if kind != "LORA":
            raise UnsupportedModelError(
                f"{name} has an adapter of PEFT type {kind}; palu works with LoRA (peft.LoraConfig)"
            )
        if getattr(config, "alora_invocation_tokens", None):
            raise ValueError(
                f"{name} has an activated LoRA, which acts on some tokens only; leave out alora_invocation_tokens"
            )
    base = base_of(model)
    head = base.get_output_embeddings() if isinstance(base, PreTrainedModel) else None
    head_weight = None if head is None else getattr(_inner(head), "weight", None)
    if head_weight is None:  # no causal language model: for others to report
        return
    for path, module in base.named_modules():
        wrapped = _inner(module)
        if wrapped is not module and getattr(wrapped, "weight", None) is head_weight:
            tied = "" if module is head else ", which is tied to the head"
            raise ValueError(
                f"the adapter of {name} is on {path}{tied}; PALU needs the head as the reference has it: "
                f"leave {path} out of target_modules, modules_to_save and trainable_token_indices"
            )


def check_trainable(model: CausalLM, own_reference: bool) -> None:
    """Raise ValueError where an adapter cannot be trained, or be switched off to have an ``own_reference``."""
    if not is_peft(model):
        return
    active: Any = model.active_adapters
    if len(active) != 1:
        raise ValueError(
            f"the model has {len(active)} active adapters ({', '.join(active) or 'none'}); "
            "choose the one to train with set_adapter"
        )
    (adapter,) = active
    status = model.get_model_status()
    if status.merged_adapters:
        raise ValueError(
            f"the adapter {adapter!r} is merged into the base weights; call unmerge_adapter() before unlearning"
        )
    if status.enabled is not True:
        raise ValueError(f"the adapter {adapter!r} is disabled; call base_model.enable_adapter_layers()")
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    own = [name for name in trainable if re.search(rf"{_OF_ADAPTER}{re.escape(adapter)}(\.|$)", name)]
    if not own:
        raise ValueError(
            f"no parameter of the adapter {adapter!r} requires a gradient, so nothing could be unlearned; "
            "load it with is_trainable=True"
        )
    if other := sorted(set(trainable) - set(own)):
        raise ValueError(
            f"{other[0]} requires a gradient and is no part of the adapter {adapter!r}, "
            "so that saving the adapter would lose it; freeze it"
        )
    config: Any = model.peft_config[adapter]
    start = config.init_lora_weights
    took = isinstance(start, str) and start.lower().startswith(_TAKES_FROM_BASE)
    if own_reference and (took or getattr(config, "kasa_config", None) is not None):
        raise ValueError(
            f"the adapter {adapter!r} was initialised by {start if took else 'kasa'}, which changes the base weights, "
            "so that the model without its adapter is not the model before training; pass ref_model"
        )


def _inner(module: nn.Module) -> nn.Module:
    """Return the layer that PEFT has wrapped, or the module itself."""
    while (inner := getattr(module, "base_layer", getattr(module, "original_module", None))) is not None:
        module = inner
    return module
