"""AdamW for the weights as they are loaded: torch's for float32, Kahan-compensated for bfloat16; or with 8-bit moments.

Near 0.02 neighbouring bfloat16 values lie 1.2e-4 apart, so that plain AdamW rounds a step of 1e-5 away. optimi's AdamW
keeps what was rounded off in a buffer (Kahan summation) and adds it to the next step: its weights are those of float32
training, rounded. Bytes for each trained weight, gradient and states included: 16 in float32, 10 in bfloat16.

Loaded weights lie on bfloat16 values exactly, and Adam's first steps are all of one size: with an empty buffer nothing
would change for some steps, and then all weights of one magnitude at once. So the buffers begin with a random part of
the distance to the neighbours (:func:`dither`); from the first step on, as many weights change as the step is long.

``adamw_8bit`` is torchao's AdamW, whose moments take a byte each. Its bfloat16 weights are rounded up or down at
random, so that they are right on average, and nothing need be kept: 6 bytes for each trained weight, 10 in float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import optimi
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from palu.config import UnlearnConfig
from palu.distributed import shard_like
from palu.hashing import digest

BETAS, EPS = (0.9, 0.999), 1e-8  # torch's defaults; optimi has others
EIGHT_BIT = "adamw_8bit"
# What an optimizer keeps of a parameter: 8-bit moments are codes, with a scale for each block of 256.
STATE = (
    "step",
    "exp_avg",
    "exp_avg_sq",
    "kahan_comp",
    *(f"exp_avg{m}.{p}" for m in ("", "_sq") for p in ("codes", "scale")),
)


def make_optimizer(
    parameters: Iterable[nn.Parameter], config: UnlearnConfig, accelerator: Accelerator
) -> torch.optim.Optimizer:
    """Make AdamW for the parameters that require a gradient.

    DeepSpeed is to keep float32 copies of bfloat16 weights itself, so it gets torch's (not tried: see docs/memory.md).
    """
    trained = [p for p in parameters if p.requires_grad]
    if config.optimizer == EIGHT_BIT:
        return _adamw_8bit(trained, config, accelerator.device)
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


def _adamw_8bit(trained: list[nn.Parameter], config: UnlearnConfig, device: torch.device) -> torch.optim.Optimizer:
    """Make torchao's AdamW with 8-bit moments; in bfloat16 all processes round the same way, and a resumed run, too."""
    optimizer = _import_torchao().AdamW8bit(
        trained, config.learning_rate, BETAS, EPS, config.weight_decay, bf16_stochastic_round=True
    )
    drawing, rates = ExitStack(), [config.learning_rate]

    def before(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        rates[:] = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:  # a number for schedules and checkpoints, a tensor for torchao
            group["lr"] = torch.tensor(group["lr"], dtype=torch.float32)
            group["steps"] += 1
        # Random numbers of its own: the model's dropout differs between processes.
        drawing.enter_context(torch.random.fork_rng([device] if device.type != "cpu" else [], device_type="cuda"))
        torch.manual_seed(int(digest([config.seed, optimizer.param_groups[0]["steps"]])[:8], 16))  # a CPU takes 32 bits

    def after(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        drawing.close()
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    (group,) = optimizer.param_groups
    group |= {"lr": config.learning_rate, "steps": 0}
    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)
    return optimizer


def check_optimizer(model: nn.Module, config: UnlearnConfig, accelerator: Accelerator) -> None:
    """Raise ValueError where the optimizer could not do what is asked of it, ImportError without its package."""
    low = any(p.dtype == torch.bfloat16 and p.requires_grad for p in model.parameters())
    if config.optimizer == EIGHT_BIT:
        if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            raise ValueError(
                f"optimizer = {EIGHT_BIT!r}: not supported under {accelerator.distributed_type.value}, which shards "
                "the weights; use DDP or one process, or optimizer = 'adamw'"
            )
        _import_torchao()
    elif config.weight_decay and low:
        raise ValueError(
            f"weight_decay = {config.weight_decay}: weights in bfloat16 round it away; set 0, or load the model with "
            f"dtype=torch.float32, or set optimizer = {EIGHT_BIT!r}, which rounds at random"
        )


def _import_torchao() -> Any:
    try:
        import torchao.optim
    except ImportError as error:
        raise ImportError(
            f"optimizer = {EIGHT_BIT!r} needs torchao ({error}); pip install 'palu-unlearn[8bit]'"
        ) from error
    return torchao.optim


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


def state_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """Return what the optimizer keeps of a parameter, under the names in STATE; 8-bit moments in their parts."""
    state: dict[str, Tensor] = {}
    for name, value in optimizer.state.get(parameter, {}).items():
        parts = getattr(value, "tensor_attrs", None)  # torchao's
        state |= {name: value} if parts is None else {f"{name}.{part}": getattr(value, part) for part in parts}
    return {name: value for name, value in state.items() if name in STATE and isinstance(value, Tensor)}


def load_state(
    optimizer: torch.optim.Optimizer, states: Sequence[Mapping[str, Tensor]], rates: Sequence[Any], steps: int
) -> None:
    """Restore an optimizer of :func:`make_optimizer`.

    Args:
        states: :func:`state_of` each parameter, in the optimizer's order; empty for one that no gradient has reached.
        rates: the learning rate of each group.
        steps: how many were taken.
    """
    groups = optimizer.state_dict()["param_groups"]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    loaded: list[dict[str, Any]] = [_joined(state, p.dtype) for state, p in zip(states, parameters, strict=True)]
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate
        if "steps" in group:
            group["steps"] = steps
        if "setup" in group:  # optimi counts steps here, and starts anew where a state lacks a name
            group |= {"setup": True, "step": torch.tensor(steps, dtype=torch.int32)}
            loaded = [{"kahan_comp": None, **state} if state else {} for state in loaded]
    optimizer.load_state_dict({"state": {i: s for i, s in enumerate(loaded) if s}, "param_groups": groups})


def _joined(state: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Any]:
    """Put the parts of 8-bit moments together again."""
    joined: dict[str, Any] = {name: value for name, value in state.items() if "." not in name}
    for name in (name.removesuffix(".codes") for name in state if name.endswith(".codes")):
        from torchao.optim.subclass_8bit import OptimState8bit

        codes, scale = state[f"{name}.codes"], state[f"{name}.scale"]
        signed, block = name == "exp_avg", codes.numel() // scale.numel()
        joined[name] = OptimState8bit.zeros(codes.shape, signed, block, codes.device, dtype)
        joined[name].codes.copy_(codes)
        joined[name].scale.copy_(scale)
    return joined
