"""Register the plain-torch twins as kernels where there is no native one.

That is for `topk_unlikelihood` everywhere and for `cross_entropy_`, `kl_div_` and `adamw_` on CPUs, where our
own kernel would be no faster, and for every op on devices without native kernels: CUDA without nvcc, MPS, XPU and
others. There they are slower, form logits [R, V] where the native kernels need none, and warn once for each kind of
device. They check their arguments as the native ones do.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from palu import eager
from palu.eager import acc_dtype
from palu.ops.library import NATIVE_DEVICES, check_values, checked_tensors, no_native_kernels

_ops = torch.ops.palu
_library = torch.library.Library("palu", "IMPL")  # the kernels go with it
_warned: set[str] = set()  # kinds of device


def _register(op: str, twin: Callable[..., Any]) -> None:
    check = getattr(_ops, f"_check_{op}")

    def kernel(*args: Any) -> Any:
        given = checked_tensors(op, args, {})
        check(*args)
        if "index" in given:
            logits = given.get("logits", given.get("grad_logits"))
            vocab_size = given["weight"].shape[0] if logits is None else logits.shape[1]
            if given["index"].device.type != "cuda":  # whose own kernels assert it: to ask would be to wait for the GPU
                check_values(f"palu::{op}", "index", given["index"], vocab_size)
        kind = args[0].device.type
        if kind not in NATIVE_DEVICES | _warned:
            _warned.add(kind)
            warnings.warn(no_native_kernels(kind), RuntimeWarning, stacklevel=2)
        # As in a native kernel, nothing is recorded, and the caller's autocast has no say.
        with torch.no_grad(), torch.autocast(kind, enabled=False):
            return twin(*args)

    # Comes after a kernel of the device itself. The autograd formulas stay those of palu/ops/library.py.
    _library.impl(op, kernel, "CompositeExplicitAutograd")


def _topk_mse(logits: Tensor, index: Tensor, target: str, constant: float) -> tuple[Tensor, Tensor]:
    return eager.topk_mse_and_slope(logits, index, constant if target == "constant" else target)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    dtype = acc_dtype(hidden.dtype)  # in which slopes are kept: logits in a half type would not do
    return F.linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


for _op in ("prefix_mask", "topk_backward", "linear_topk_backward", "cross_entropy_", "kl_div_", "adamw_"):
    _register(_op, getattr(eager, _op))
_register("topk_mse", _topk_mse)
_register("topk_unlikelihood", eager.topk_unlikelihood_and_slope)
_register("linear_topk_mse", lambda h, w, index, b, mean, *of: _topk_mse(_logits(h, w, b), index, *of))
_register(
    "linear_topk_unlikelihood",
    lambda h, w, index, b, floor: eager.topk_unlikelihood_and_slope(_logits(h, w, b), index, floor),
)
