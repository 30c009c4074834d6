"""Helpers for many processes: raise errors on all ranks, wait for one of them, gather and shard tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from functools import lru_cache
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor, distribute_tensor

T = TypeVar("T")

# A collective gives up after some minutes, which tells of a hang. Where one process hashes, records or writes while the
# others wait, waiting is no fault; a process that dies is the launcher's to notice.
PATIENCE = timedelta(days=7)


class ProcessError(RuntimeError):
    """Another process of the run has stopped; its message is in this one."""


@contextmanager
def raise_on_all_ranks(accelerator: Accelerator) -> Iterator[None]:
    """Raise an error in the block on any process on all of them, so that none waits for one that has left.

    The block itself must not communicate, but where an error in it is sure to be one of all processes.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    errors = gather_values(None if error is None else f"{type(error).__name__}: {error}", accelerator)
    if error is None and any(errors):
        index = next(i for i, words in enumerate(errors) if words)
        raise ProcessError(f"process {index} has stopped: {errors[index]}")
    if error is not None:
        raise error


def gather_values(value: T, accelerator: Accelerator) -> list[T]:
    """Gather a picklable value of each process, by rank. All processes must call it, within PATIENCE."""
    if accelerator.num_processes == 1:
        return [value]
    values: list[Any] = [None] * accelerator.num_processes
    distributed.all_gather_object(values, value, _patient_group(distributed.group.WORLD))
    return values


def compute_on_main(function: Callable[[], T], accelerator: Accelerator) -> T:
    """Call a function on the main process while the others wait; return what it gives, and raise what it raises."""
    value: Any = None
    with raise_on_all_ranks(accelerator):
        if accelerator.is_main_process:
            value = function()
    return gather_values(value, accelerator)[0]


@lru_cache(maxsize=1)
def _patient_group(world: Any) -> Any:
    """Make a group of all processes on the CPU, once for each time that torch.distributed was started."""
    return distributed.new_group(backend="gloo", timeout=PATIENCE)


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
