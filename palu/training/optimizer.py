"""AdamW for the weights as they are loaded: torch's for float32, ours for bfloat16.

Near 0.02 neighbouring bfloat16 values lie 1.2e-4 apart, so that plain AdamW rounds a step of 1e-5 away. Neighbouring
values differ by up to 0.8 %, so that a second moment in bfloat16 never decays by a thousandth, either.
:class:`BFloat16AdamW` is AdamW on float32 weights and second moments: a bfloat16 weight is the upper half of a float32
one, rounded, and the lower half is kept beside it. Bytes for each trained weight, gradient and states included: 16 in
float32, 12 in bfloat16.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from palu.config import UnlearnConfig
from palu.distributed import full_tensor, shard_like
from palu.ops import adamw_

BETAS, EPS = (0.9, 0.999), 1e-8  # torch's defaults


def make_optimizer(
    parameters: Iterable[nn.Parameter], config: UnlearnConfig, accelerator: Accelerator
) -> torch.optim.Optimizer:
    """Make AdamW for the parameters that require a gradient.

    DeepSpeed is to keep float32 copies of bfloat16 weights itself, so it gets torch's (not tried: see docs/memory.md).
    """
    trained = [p for p in parameters if p.requires_grad]
    rate = config.learning_rate or 0.0  # 0: chosen in the first step
    low = any(p.dtype == torch.bfloat16 for p in trained)
    if low and accelerator.distributed_type != DistributedType.DEEPSPEED:
        return BFloat16AdamW(trained, rate, config.weight_decay, config.seed)
    fused = accelerator.device.type in ("cpu", "cuda")
    return torch.optim.AdamW(trained, rate, BETAS, EPS, config.weight_decay, fused=fused)


class BFloat16AdamW(torch.optim.Optimizer):
    """AdamW that keeps for a bfloat16 weight the lower half of its float32 bits.

    The first moment has the weight's dtype, the second one is float32. Weights in float32 may stand beside those in
    bfloat16. FSDP2 may shard them: each process steps its own part.

    Loaded weights lie on bfloat16 values exactly, and Adam's first steps are all of one size: with lower halves of 0
    nothing would change for some steps, and then all weights of one magnitude at once. So they begin at random, within
    half the distance to the neighbours; from the first step on, as many weights change as the step is long.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], learning_rate: float, weight_decay: float, seed: int):
        super().__init__(parameters, {"lr": learning_rate, "weight_decay": weight_decay})
        self.seed = seed  # of the lower halves; all processes draw the same
        self.clip_factor: Tensor | None = None  # float32 scalar on the device: what gradients are multiplied by

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take a step with the gradients that there are."""
        if not self.state:  # not before an engine has sharded the weights
            self._start()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    state["step"] += 1
                    own, grad, m, v = map(_local, (p, p.grad, state["exp_avg"], state["exp_avg_sq"]))
                    low = _local(state["low_bits"]) if "low_bits" in state else None
                    if not own.is_contiguous():  # the moments lie as it does
                        order = sorted(range(own.dim()), key=own.stride, reverse=True)
                        own, grad, m, v = (tensor.permute(order) for tensor in (own, grad, m, v))
                        low = None if low is None else low.permute(order)
                    numbers = int(state["step"]), group["lr"], group["weight_decay"], *BETAS, EPS
                    adamw_(own, grad, m, v, low, self.clip_factor, *numbers)

    def _start(self) -> None:
        generators: dict[torch.device, torch.Generator] = {}
        for p in (p for group in self.param_groups for p in group["params"]):
            state = self.state[p] = {
                "step": torch.zeros(()),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p, dtype=torch.float32),
            }
            if p.dtype == torch.bfloat16:
                generator = generators.setdefault(p.device, torch.Generator(p.device).manual_seed(self.seed))
                state["low_bits"] = _random_low_bits(p, generator)


def _random_low_bits(p: Tensor, generator: torch.Generator) -> Tensor:
    """Draw int16 in the guise of bfloat16, since gloo gathers no int16; below a half, so that p stays as it is."""
    most = int(0.99 * 2**15)
    drawn = torch.randint(-most, most + 1, p.shape, generator=generator, device=p.device, dtype=torch.int16)
    low_bits = torch.zeros_like(p)
    _local(low_bits).view(torch.int16).copy_(_local(shard_like(p, drawn)) * (_local(p) != 0))  # below 0 there is NaN
    return low_bits


def _local(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def clip_gradients(run: Any, parameters: Sequence[nn.Parameter]) -> Tensor:
    """Clip the gradients of a step to a 2-norm; return the norm before, scalar, on the accelerator's device.

    :class:`BFloat16AdamW` multiplies by the factor as it reads them, so that they are not written once more.
    ``run``: a :class:`palu.training.step.Run`.
    """
    accelerator, most = run.accelerator, run.config.max_grad_norm
    optimizer = getattr(run.optimizer, "optimizer", run.optimizer)  # accelerate's wrapper holds it
    if isinstance(optimizer, BFloat16AdamW):
        norm = full_tensor(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
        optimizer.clip_factor = (most / (norm.float() + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_
        return norm
    found: Any = accelerator.clip_grad_norm_(parameters, most)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return torch.tensor(found if run.method.was_step_applied() else math.inf, device=accelerator.device)
    return full_tensor(found)


def load_state(optimizer: torch.optim.Optimizer, states: Sequence[Mapping[str, Tensor]], rate: float) -> None:
    """Restore an optimizer of :func:`make_optimizer`.

    ``states``: of each parameter, in the optimizer's order; empty for one that no gradient has reached. Copied.
    """
    (group,) = optimizer.param_groups
    group["lr"] = rate
    for p, state in zip(group["params"], states, strict=True):
        # Not by load_state_dict, which would round float32 moments to the dtype of the weight.
        for name, value in state.items():
            if name == "step":
                optimizer.state[p][name] = value.to(p.device if group.get("fused") else "cpu", copy=True)
            else:  # laid out as the weight is
                optimizer.state[p][name] = torch.empty_like(p, dtype=value.dtype).copy_(value)
