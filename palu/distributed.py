"""Helpers for many processes: raise errors on all ranks, agree on a condition, gather and shard tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


@contextmanager
def raise_on_all_ranks(accelerator: Accelerator) -> Iterator[None]:
    """Raise an error in the block on any process on all of them, so that none waits for one that has left.

    The block itself must not communicate.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    if accelerator.num_processes > 1:
        errors = gather_object([None if error is None else f"{type(error).__name__}: {error}"])
        if error is None and any(errors):
            index = next(i for i, words in enumerate(errors) if words)
            raise RuntimeError(f"process {index} has stopped: {errors[index]}")
    if error is not None:
        raise error


def all_ranks(condition: bool, accelerator: Accelerator) -> bool:
    """Whether a condition holds on every process. All processes must call it."""
    return all(gather_object([condition])) if accelerator.num_processes > 1 else condition


def autocast(accelerator: Accelerator) -> AbstractContextManager[Any]:
    """Autocast for a model outside its engine: DeepSpeed has mixed precision only in the weights that it trains."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED and accelerator.mixed_precision == "bf16":
        return torch.autocast(accelerator.device.type, torch.bfloat16)
    return accelerator.autocast()


def full_tensor(tensor: Tensor) -> Tensor:
    """Gather a tensor that FSDP2 may have sharded, whole on every process. All processes must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(parameter: Tensor, tensor: Tensor) -> Tensor:
    """Shard a whole tensor as FSDP2 may have sharded a parameter: this process's part of it."""
    if not isinstance(parameter, DTensor):
        return tensor
    mesh = parameter.device_mesh
    return distribute_tensor(tensor.to(mesh.device_type), mesh, parameter.placements, src_data_rank=None)
