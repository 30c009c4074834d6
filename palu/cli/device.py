"""The option ``--device`` of the commands that run a model."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import torch

Device = Annotated[
    str | None,
    typer.Option(
        help="Where the model runs: cpu, cuda, cuda:1, mps, ... [default: the first GPU that torch sees, else the CPU]",
        metavar="DEVICE",
    ),
]


def choose_device(name: str | None) -> torch.device:
    """Return the device of this command, and have accelerate use it: the one that is named, or accelerate's choice.

    Call it before anything else uses accelerate. Raises ValueError where there is no such device.
    """
    import torch
    from accelerate import Accelerator

    if name is not None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError(f"--device {name}: the launcher gives each process its device; leave it out")
        there = ["cpu"]
        if torch.accelerator.is_available() and (found := torch.accelerator.current_accelerator()) is not None:
            there += [found.type, *(f"{found.type}:{i}" for i in range(torch.accelerator.device_count()))]
        if name not in there:
            raise ValueError(f"--device {name}: torch has no such device here; give one of {', '.join(there)}")
        if ":" in name:
            torch.accelerator.set_device_index(int(name.partition(":")[2]))
        os.environ["ACCELERATE_TORCH_DEVICE"] = name
    return Accelerator().device
