"""Register the batching rules of the ops, for `torch.func.vmap` and `is_grads_batched`.

Every op treats its rows one by one, so a batch of calls is one call with more rows, unless they differ in what the rows
share (the head, its gradients): then it is a call for each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from palu.ops import library  # noqa: F401  (loads the ops)

_ops = torch.ops.palu
_library = torch.library.Library("palu", "IMPL")  # the kernels go with it

# The tensors that have no rows, or whose rows are not those of the loss.
_SHARED = frozenset({"weight", "bias", "weight_mean", "grad_weight", "grad_bias", "tensor", "factor"})


def _register(op: str) -> None:
    call = getattr(_ops, op)
    arguments = call.default._schema.arguments
    names = [argument.name for argument in arguments]
    written = {a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write}

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        size = info.batch_size
        tensors = {i: names[i] for i, value in enumerate(args) if isinstance(value, Tensor)}
        for i, name in tensors.items():
            if name in written and in_dims[i] is None:
                raise RuntimeError(
                    f"palu::{op} under torch.func.vmap: {name} would be overwritten by each of the {size} calls; "
                    "give one for each (batch it, too)"
                )
        batch_first = [t if dim is None else t.movedim(dim, 0) for t, dim in zip(args, in_dims, strict=True)]
        if any(name in _SHARED and in_dims[i] is not None for i, name in tensors.items()):
            calls = [
                call(*(t if dim is None else t[b] for t, dim in zip(batch_first, in_dims, strict=True)))
                for b in range(size)
            ]
            if isinstance(calls[0], tuple):
                return tuple(torch.stack(results) for results in zip(*calls, strict=True)), (0,) * len(calls[0])
            return (None, None) if calls[0] is None else (torch.stack(calls), 0)

        flat = list(batch_first)
        for i, name in tensors.items():
            if name not in _SHARED:
                t = batch_first[i] if in_dims[i] is not None else args[i].expand(size, *args[i].shape)
                # What is written was allocated by the backward pass, so it is contiguous and this is a view of it.
                flat[i] = t.view(size * t.shape[1], *t.shape[2:]) if name in written else t.flatten(0, 1)
        results = call(*flat)
        if isinstance(results, tuple):
            return tuple(t.unflatten(0, (size, -1)) for t in results), (0,) * len(results)
        return (None, None) if results is None else (results.unflatten(0, (size, -1)), 0)

    torch.library.register_vmap(f"palu::{op}", rule)

    def refuse(*_: Any) -> None:
        name = op.removesuffix("_backward")
        raise RuntimeError(f"palu::{name}: is_grads_batched=True is not supported; take the gradients one by one")

    if written:  # torch.autograd.grad has a vmap of its own, whose rules cannot be written in Python
        _library.impl(op, refuse, "Batched")


for _op in (
    "prefix_mask",
    "topk_mse",
    "topk_mse_backward",
    "linear_topk_mse",
    "linear_topk_mse_frozen",
    "linear_topk_mse_backward",
    "cross_entropy_",
    "unlikelihood_",
    "kl_div_",
    "scale_",
):
    _register(_op)
