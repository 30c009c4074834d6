"""Load the native ops, and register their fakes and autograd formulas with torch.

Importing this module loads the extension, prebuilt or compiled just in time, so that every op is registered before
anything can trace it; `import palu` alone imports neither this module nor torch. Formulas are in `csrc/*.h`. They are
of first order and for reverse mode; whoever asks for another derivative gets an error (here and in `csrc/ops.cpp`).
"""

import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from palu import _build
from palu.eager import acc_dtype


def _load() -> str:
    found = importlib.util.find_spec("palu._C")
    if found is None or found.origin is None:
        prebuilt = "no module palu._C is installed"
    else:
        try:
            _build.check_built_for(Path(found.origin))
            return str(importlib.import_module("palu._C").__file__)
        except (ImportError, OSError) as error:
            prebuilt = f"palu._C does not load, most likely because it was built for another torch: {error}"
            warnings.warn(f"{prebuilt}; compiling just in time", RuntimeWarning, stacklevel=2)
    try:
        return _build.jit()
    except Exception as error:
        raise ImportError(
            "palu's native ops are not available.\n"
            f"  prebuilt: {prebuilt}\n"
            f"  just in time: {error}\n"
            "Install a C++ compiler (and nvcc for CUDA), or build the module where there is one: run "
            "`pip install --no-build-isolation .` in palu's checkout, or `make wheels` for other machines"
        ) from error


_extension_path = _load()
# Set: indices and labels are looked at before a GPU is, whose assertion names none, and ends the process's use of it.
CHECK = os.environ.get("PALU_CHECK") == "1"
_ops = torch.ops.palu
# Kinds of device whose kernels are in the extension; elsewhere those of palu/ops/twins.py serve.
NATIVE_DEVICES = frozenset(
    kind for kind in ("cpu", "cuda") if torch._C._dispatch_has_kernel_for_dispatch_key("palu::topk_mse", kind.upper())
)


def no_native_kernels(kind: str) -> str:
    """Say what serves a kind of device that has no native kernels here, why, and what helps if anything does."""
    if kind != "cuda" or torch.version.cuda is None:  # ROCm calls itself cuda, too
        return f"palu has no native kernels for {kind} devices: plain PyTorch stands in there, which is slower"
    return (
        "palu's native ops were built without CUDA, where nvcc was not found: plain PyTorch stands in on cuda devices, "
        f"which is slower. Install the CUDA toolkit {torch.version.cuda}, and where palu's ops are prebuilt install "
        "palu again (pip install --no-build-isolation . in its checkout)"
    )


def extension_path() -> str:
    """Return the path of the extension that is loaded: the prebuilt module, or the one compiled just in time."""
    return _extension_path


def check_tensors(who: str, **tensors: Tensor) -> None:
    """Raise TypeError or ValueError where an argument is no dense tensor, or not on the device of the first one.

    torch's dispatcher would say less, and where one of them is on the meta device, give results that nobody computed.
    """
    first = next(iter(tensors))
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{who}: {name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.layout != torch.strided or tensor.is_nested or tensor.is_quantized:
            kind = "a nested" if tensor.is_nested else "a quantised" if tensor.is_quantized else f"a {tensor.layout}"
            raise TypeError(f"{who}: {name} must be a dense tensor, got {kind} one")
        if tensor.device != tensors[first].device:
            there = f"{first} is on {tensors[first].device}"
            raise ValueError(f"{who}: {name} is on {tensor.device} but {there}; move it there")


@cache
def _argument_names(op: str) -> list[str]:
    return [argument.name for argument in getattr(_ops, op).default._schema.arguments]


def checked_tensors(op: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors among an op's arguments, by their names, if :func:`check_tensors` finds no fault."""
    given = {**dict(zip(_argument_names(op), args, strict=False)), **kwargs}
    tensors = {name: t for name, t in given.items() if isinstance(t, Tensor)}
    check_tensors(f"palu::{op}", **tensors)
    return tensors


def check_values(who: str, name: str, index: Tensor, vocab_size: int) -> None:
    """Raise IndexError where an index or a label [R, ...] is out of range: the first one is named."""
    if len(bad := ((index < 0) | (index >= vocab_size)).nonzero()):
        place = bad[0].tolist()
        raise IndexError(
            f"{who}: {name}{place} = {int(index[tuple(place)])} is out of range for a vocabulary of {vocab_size}"
        )


# Fakes: shapes and dtypes for torch.compile. Meta tensors come to them, too, and a call with even one such tensor: it
# must not return results that nobody computed.


def _register_fake(op: str, fake: Callable[..., Any]) -> None:
    def checked(*args: Any, **kwargs: Any) -> Any:
        checked_tensors(op, args, kwargs)
        return fake(*args, **kwargs)

    torch.library.register_fake(f"palu::{op}", checked)


def _losses_and(rows: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
    dtype = acc_dtype(rows.dtype)
    return rows.new_empty(rows.shape[0], dtype=dtype), rows.new_empty(shape, dtype=dtype)


_register_fake("prefix_mask", lambda labels, *_, **__: labels.new_empty(labels.shape, dtype=torch.bool))
for _op in ("topk_mse", "topk_unlikelihood"):
    _register_fake(_op, lambda logits, index, *_: _losses_and(logits, index.shape))
    _register_fake(f"linear_{_op}", lambda hidden, weight, index, *_: _losses_and(hidden, index.shape))
_register_fake("linear_topk_mse_frozen", lambda hidden, *_: _losses_and(hidden, hidden.shape))
for _op in ("topk_backward", "linear_topk_backward", "adamw_"):
    _register_fake(_op, lambda *_: None)
for _op in ("cross_entropy_", "kl_div_"):
    _register_fake(_op, lambda logits, of, row_weight, *_: row_weight.new_empty(row_weight.shape))


# Autograd: what the forward pass returns beside the losses is kept for the backward pass, and has no gradient.


def first_order_only(who: str, instead: str) -> None:
    """Raise where a backward pass is asked to be differentiable itself; `instead` can be used.

    torch's once_differentiable would not do: it takes the derivative for what was saved to be zero.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(f"{who} has first derivatives only, and create_graph=True asks for a second; use {instead}")


def _register_autograd(op: str, setup: Callable[..., None], backward: Callable[..., tuple[Tensor | None, ...]]) -> None:
    """Register a formula; `backward` returns the first gradients, and the other arguments get none."""
    twin, arguments = op.removesuffix("_frozen"), len(_argument_names(op))

    def first_order(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        first_order_only(f"palu::{twin}", f"palu.eager.{twin}")
        grads = backward(ctx, grad)
        return *grads, *[None] * (arguments - len(grads))

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        setup(ctx, inputs, output[1])

    torch.library.register_autograd(f"palu::{op}", first_order, setup_context=setup_context)


def _topk_setup(ctx: Any, inputs: tuple[Any, ...], slope: Tensor) -> None:
    logits, index, setting, *_ = inputs
    ctx.through_mean, ctx.shape, ctx.dtype = setting == "global_mean", logits.shape, logits.dtype
    ctx.save_for_backward(slope, index)


def _topk_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_logits = grad.new_empty(ctx.shape, dtype=ctx.dtype)
    _ops.topk_backward(grad, *ctx.saved_tensors, ctx.through_mean, grad_logits)
    return (grad_logits,)


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], slope: Tensor) -> None:
    hidden, weight, index, bias, *settings = inputs
    mean, target, _ = settings if len(settings) == 3 else (None, None, None)  # unlikelihood has a floor alone
    ctx.through_mean = target == "global_mean"
    ctx.save_for_backward(slope, hidden, weight, index, mean, bias)


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    *saved, bias = ctx.saved_tensors
    _, hidden, weight, *_ = saved
    asked = *ctx.needs_input_grad[:2], ctx.needs_input_grad[3]
    grads = [t.new_zeros(t.shape) if a else None for t, a in zip((hidden, weight, bias), asked, strict=True)]
    _ops.linear_topk_backward(grad, *saved, ctx.through_mean, *grads)  # adds to them
    return grads[0], grads[1], None, grads[2]


def _frozen_setup(ctx: Any, inputs: tuple[Any, ...], grad_hidden: Tensor) -> None:
    ctx.dtype = inputs[0].dtype
    ctx.save_for_backward(grad_hidden)


def _frozen_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (grad_hidden,) = ctx.saved_tensors
    return ((grad[:, None] * grad_hidden).to(ctx.dtype),)


for _op in ("topk_mse", "topk_unlikelihood"):
    _register_autograd(_op, _topk_setup, _topk_backward)
    _register_autograd(f"linear_{_op}", _linear_setup, _linear_backward)
_register_autograd("linear_topk_mse_frozen", _frozen_setup, _frozen_backward)
