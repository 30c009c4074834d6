"""AdamW for the weights as they are loaded: torch's for float32, Kahan-compensated for bfloat16.

Near 0.02 neighbouring bfloat16 values lie 1.2e-4 apart, so that plain AdamW rounds a step of 1e-5 away. optimi's AdamW
keeps what was rounded off in a buffer (Kahan summation) and adds it to the next step: its weights are those of float32
training, rounded. Bytes for each trained weight, gradient and states included: 16 in float32, 10 in bfloat16.

Loaded weights lie on bfloat16 values exactly, and Adam's first steps are all of one size: with an empty buffer nothing
would change for some steps, and then all weights of one magnitude at once. So the buffers begin with a random part of
the distance to the neighbours (:func:`dither`); from the first step on, as many weights change as the step is long.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import optimi
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from palu.config import UnlearnConfig
from palu.distributed import shard_like

BETAS, EPS = (0.9, 0.999), 1e-8  # torch's defaults; optimi has others


def make_optimizer(
    parameters: Iterable[nn.Parameter], config: UnlearnConfig, accelerator: Accelerator
) -> torch.optim.Optimizer:
    """Make AdamW for the parameters that require a gradient.

    DeepSpeed is to keep float32 copies of bfloat16 weights itself, so it gets torch's (not tried: see docs/memory.md).
    """
    trained = [p for p in parameters if p.requires_grad]
    compensated = any(p.dtype == torch.bfloat16 for p in trained)
    if compensated and accelerator.distributed_type != DistributedType.DEEPSPEED:
        # The plain loop: its fused kernels have not been tried on sharded weights.
        return optimi.AdamW(
            trained, config.learning_rate, BETAS, config.weight_decay, EPS, kahan_sum=True, foreach=False, triton=False
        )
    return torch.optim.AdamW(
        trained,
        config.learning_rate,
        BETAS,
        EPS,
        config.weight_decay,
        fused=accelerator.device.type in ("cpu", "cuda"),
    )


def check_weight_decay(model: nn.Module, config: UnlearnConfig) -> None:
    """Raise ValueError where bfloat16 weights would round the weight decay away."""
    if config.weight_decay and any(p.dtype == torch.bfloat16 and p.requires_grad for p in model.parameters()):
        raise ValueError(
            f"weight_decay = {config.weight_decay}: weights in bfloat16 round it away; set 0, or load the model with "
            "dtype=torch.float32"
        )


@torch.no_grad()
def dither(optimizer: torch.optim.Optimizer, seed: int) -> None:
    """Start each compensation at random, within half the distance to the next bfloat16 value; others have none.

    To be called once the engine has sharded the weights; all processes draw the same numbers.
    """
    generators: dict[torch.device, torch.Generator] = {}
    for group in optimizer.param_groups:
        for p in group["params"] if group.get("kahan_sum") else ():
            if p.dtype != torch.bfloat16:
                continue
            generator = generators.setdefault(p.device, torch.Generator(p.device).manual_seed(seed))
            # Below a half, so that no weight changes by this alone.
            share = shard_like(p, 0.99 * (torch.rand(p.shape, generator=generator, device=p.device) - 0.5))
            # To the neighbour that is nearer to 0, which at a power of two is the nearer one; 0 where the weight is 0.
            distance = (p.detach().float().abs() * (1 - 2**-9)).log2().floor().exp2() * 2**-7
            optimizer.state[p] = {
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
                "kahan_comp": (share * distance).bfloat16(),
            }


def load_state(
    optimizer: torch.optim.Optimizer, states: Sequence[Mapping[str, Tensor | None]], rates: Sequence[Any], steps: int
) -> None:
    """Restore an optimizer of :func:`make_optimizer`.

    Args:
        states: of each parameter, in the optimizer's order; empty for one that no gradient has reached.
        rates: the learning rate of each group.
        steps: how many were taken.
    """
    groups = optimizer.state_dict()["param_groups"]
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate
        if "setup" in group:  # optimi counts steps here, and starts anew where a state lacks a name
            group |= {"setup": True, "step": torch.tensor(steps, dtype=torch.int32)}
            states = [{"kahan_comp": None, **state} if state else {} for state in states]
    optimizer.load_state_dict({"state": {i: s for i, s in enumerate(states) if s}, "param_groups": groups})
