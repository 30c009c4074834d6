"""Register the plain-torch twins as kernels for devices without native ones: CUDA without nvcc, MPS, XPU and others.

torch's dispatcher takes a device's own kernel (CPU, CUDA) where one is loaded, and one of these elsewhere. They check
their arguments as the native ones do, and warn once for each kind of device that they stand in. They are slower, and
form logits [R, V] where the native kernels need none.
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
from palu.ops.library import check_index_values, check_tensors, no_native_kernels

_ops = torch.ops.palu
_library = torch.library.Library("palu", "IMPL")  # the kernels go with it
_warned: set[str] = set()  # kinds of device


def _register(op: str, twin: Callable[..., Any]) -> None:
    names = [argument.name for argument in getattr(_ops, op).default._schema.arguments]
    check = getattr(_ops, f"_check_{op}")

    def kernel(*args: Any) -> Any:
        given = {name: t for name, t in zip(names, args, strict=False) if isinstance(t, Tensor)}
        check_tensors(f"palu::{op}", **given)
        check(*args)
        if "index" in given:
            logits = given.get("logits", given.get("grad_logits"))
            vocab_size = given["weight"].shape[0] if logits is None else logits.shape[1]
            check_index_values(f"palu::{op}", given["index"], vocab_size)
        kind = args[0].device.type
        if kind not in _warned:
            _warned.add(kind)
            warnings.warn(no_native_kernels(kind), RuntimeWarning, stacklevel=2)
        # As in a native kernel, nothing is recorded, and the caller's autocast has no say.
        with torch.no_grad(), torch.autocast(kind, enabled=False):
            return twin(*args)

    # Comes after a kernel of the device itself. The autograd formulas stay those of palu/ops/library.py.
    _library.impl(op, kernel, "CompositeExplicitAutograd")


def _topk_mse(logits: Tensor, index: Tensor, target: str, constant: float) -> tuple[Tensor, Tensor]:
    residual = eager.topk_residual(logits, index, constant if target == "constant" else target)
    return residual.square().mean(1), residual


def _linear_topk_mse(
    hidden: Tensor,
    weight: Tensor,
    index: Tensor,
    bias: Tensor | None,
    weight_mean: Tensor | None,
    target: str,
    constant: float,
) -> tuple[Tensor, Tensor]:
    # The residual is kept in this dtype: logits in a half type would not do.
    dtype = acc_dtype(hidden.dtype)
    logits = F.linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    return _topk_mse(logits, index, target, constant)


_register("prefix_mask", eager.prefix_mask)
_register("topk_mse", _topk_mse)
_register("topk_mse_backward", eager.topk_mse_backward)
_register("linear_topk_mse", _linear_topk_mse)
_register("linear_topk_mse_backward", eager.linear_topk_mse_backward)
_register("cross_entropy_", eager.cross_entropy_)
_register("unlikelihood_", eager.unlikelihood_)
_register("kl_div_", eager.kl_div_)
_register("scale_", eager.scale_)
