"""The module that an engine wraps: a model whose parts can be run on their own, sharded or not."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from palu.models.lora import CausalLM, base_of

T = TypeVar("T")


class ModelRoot(nn.Module):
    """Holds a model for an engine, which may shard it.

    FSDP2 and ZeRO-3 gather weights where a module's forward runs: a decoder layer's with the layer, all others
    (embeddings, last norm, head) with the root. So what runs a part of the model does it by :meth:`run`.
    """

    def __init__(self, model: CausalLM):
        super().__init__()
        self.model = model
        # What FSDP2 shards as one: each decoder layer; embeddings and head belong to the root itself.
        self._no_split_modules = base_of(model)._no_split_modules

    def tie_weights(self) -> None:
        """Tie the head to the embeddings again, where they were; accelerate asks for it when it has loaded shards."""
        base_of(self.model).tie_weights()

    @property
    def sharded(self) -> bool:
        """Whether FSDP2 has sharded the model: then no process holds it whole, and all run it in step."""
        return isinstance(self, FSDPModule)

    def run(self, function: Callable[[], T]) -> T:
        """Call a function that runs a part of the model, with the root's own weights at hand.

        If the model is sharded, all processes must call it, and run the same layers equally often.
        """
        results: list[T] = []  # past the engines, which convert what a forward returns
        self(lambda: results.append(function()))
        if isinstance(self, FSDPModule):
            self.reshard()  # the root stays gathered after its forward, for a backward pass
        return results[0]

    def forward(self, function: Callable[[], Any]) -> Any:
        """Call the function, amid the hooks of the engine."""
        return function()


def share_weights(model: CausalLM, *, frozen: bool = False) -> CausalLM:
    """Copy a model's modules and buffers, but not its weights; with ``frozen`` no weight of the copy is trained.

    A weight on the meta device becomes an uninitialised one on the host, as accelerate expects; it takes no memory
    before something is written to it.
    """

    def parameter(p: nn.Parameter) -> nn.Parameter:
        weight = torch.empty_like(p, device="cpu") if p.is_meta else p
        return nn.Parameter(weight.detach(), p.requires_grad and not frozen)

    memo: dict[int, Any] = {id(p): parameter(p) for p in model.parameters()}
    return copy.deepcopy(model, memo)


def roomy_device(model: CausalLM, device: torch.device) -> torch.device:
    """Return the device if the whole model and a fifth more have room on it; else the host, which is said."""
    if device.type != "cuda":
        return device
    weights = sum(p.nbytes for p in base_of(model).parameters())
    free, _ = torch.cuda.mem_get_info(device)
    if 1.2 * weights < free:
        return device
    tqdm.write(
        f"palu: the whole model ({weights / 1e9:.1f} GB) has no room on {device} ({free / 1e9:.1f} GB are free), "
        "so it is looked at on the CPU, which takes long",
        file=sys.stderr,
    )
    return torch.device("cpu")


def is_on(base: PreTrainedModel, device: torch.device) -> bool:
    """Whether a model is on a device; one without an index is any of its type, and "cpu:0" is the CPU."""
    return base.device.type == device.type and (device.type == "cpu" or device.index in (None, base.device.index))


@contextmanager
def on_device(model: CausalLM, device: torch.device) -> Iterator[None]:
    """Move a model to a device within the block, and back; one that FSDP2 has sharded stays where it is."""
    base = base_of(model)
    home = base.device
    if is_on(base, device) or any(isinstance(module, FSDPModule) for module in base.modules()):
        yield
        return
    base.to(device)  # type: ignore[arg-type]
    try:
        yield
    finally:
        base.to(home)  # type: ignore[arg-type]
