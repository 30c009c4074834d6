"""Load the native ops, and register their fakes and autograd formulas with torch.

Importing this module loads the extension, prebuilt or compiled just in time, so that every op is registered before
anything can trace it; `import palu` alone imports neither this module nor torch. Gradients are first-order: a second
derivative raises.
"""

import importlib
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from palu import _build
from palu.eager import acc_dtype

Gradients = tuple[Tensor | None, ...]


def _load() -> str:
    if importlib.util.find_spec("palu._C") is None:
        prebuilt = "no module palu._C is installed"
    else:
        try:
            return str(importlib.import_module("palu._C").__file__)
        except ImportError as error:
            prebuilt = f"palu._C does not load, most likely because it was built for another torch: {error}"
            warnings.warn(f"{prebuilt}; compiling just in time", RuntimeWarning, stacklevel=2)
    try:
        return _build.jit()
    except Exception as error:
        raise ImportError(
            "palu's native ops are not available.\n"
            f"  prebuilt: {prebuilt}\n"
            f"  just in time: {error}\n"
            "Install a C++ compiler (and nvcc for CUDA), or build the module where there is one: "
            "pip install --no-build-isolation palu-unlearn"
        ) from error


_extension_path = _load()
_ops = torch.ops.palu
# Kinds of device whose kernels are in the extension; elsewhere those of palu/ops/twins.py serve.
NATIVE_DEVICES = frozenset(
    kind for kind in ("cpu", "cuda") if torch._C._dispatch_has_kernel_for_dispatch_key("palu::topk_mse", kind.upper())
)


def no_native_kernels(kind: str) -> str:
    """Say what serves a kind of device that has no native kernels here, why, and the mend if there is one."""
    if kind != "cuda" or torch.version.cuda is None:  # ROCm calls itself cuda, too
        return f"palu has no native kernels for {kind} devices: plain PyTorch stands in there, which is slower"
    return (
        "palu's native ops were built without CUDA, where nvcc was not found: plain PyTorch stands in on cuda devices, "
        f"which is slower. Install the CUDA toolkit {torch.version.cuda}, and where palu's ops are prebuilt install "
        "palu again (pip install --no-build-isolation)"
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


def check_index_values(who: str, index: Tensor, vocab_size: int, ignore_index: int | None = None) -> None:
    """Raise IndexError where an index [R, K], or labels [R], are out of range.

    Not on CUDA: torch's own kernels assert it there, and to ask would be to wait for the GPU.
    """
    if index.device.type == "cuda":
        return
    wrong = (index < 0) | (index >= vocab_size)
    if ignore_index is not None:
        wrong &= index != ignore_index
    if len(bad := wrong.nonzero()):
        place = tuple(bad[0].tolist())
        name = "index" if len(place) == 2 else "labels"
        raise IndexError(
            f"{who}: {name}{list(place)} = {int(index[place])} is out of range for a vocabulary of {vocab_size}"
        )


# ---------------------------------------------------------------------------------------------------
# Fakes: shapes and dtypes for torch.compile


def _register_fake(op: str) -> Callable[[Callable[..., Any]], None]:
    """Register a fake, which is the op's kernel for meta tensors too.

    A call with even one such tensor comes here, and must not return results that nobody computes.
    """

    def register(fake: Callable[..., Any]) -> None:
        names = [argument.name for argument in getattr(_ops, op).default._schema.arguments]

        def checked(*args: Any, **kwargs: Any) -> Any:
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            check_tensors(f"palu::{op}", **{name: t for name, t in given.items() if isinstance(t, Tensor)})
            return fake(*args, **kwargs)

        torch.library.register_fake(f"palu::{op}", checked)

    return register


@_register_fake("prefix_mask")
def _(labels: Tensor, n: int, eos_token_id: int | None = None) -> Tensor:
    return labels.new_empty(labels.shape, dtype=torch.bool)


@_register_fake("topk_mse")
def _(logits: Tensor, index: Tensor, target: str, constant: float) -> tuple[Tensor, Tensor]:
    dtype = acc_dtype(logits.dtype)
    return logits.new_empty(logits.shape[0], dtype=dtype), logits.new_empty(index.shape, dtype=dtype)


@_register_fake("linear_topk_mse")
def _(
    hidden: Tensor,
    weight: Tensor,
    index: Tensor,
    bias: Tensor | None,
    weight_mean: Tensor | None,
    target: str,
    constant: float,
) -> tuple[Tensor, Tensor]:
    dtype = acc_dtype(hidden.dtype)
    return hidden.new_empty(hidden.shape[0], dtype=dtype), hidden.new_empty(index.shape, dtype=dtype)


def _writes_only(*_: Any) -> None:
    return None


_register_fake("topk_mse_backward")(_writes_only)
_register_fake("linear_topk_mse_backward")(_writes_only)
_register_fake("scale_")(_writes_only)


def _loss_of_rows(logits: Tensor, _: Tensor, row_weight: Tensor, setting: float | bool | None = None) -> Tensor:
    return torch.empty_like(row_weight, memory_format=torch.contiguous_format)


_register_fake("cross_entropy_")(_loss_of_rows)
_register_fake("unlikelihood_")(_loss_of_rows)
_register_fake("kl_div_")(_loss_of_rows)


# ---------------------------------------------------------------------------------------------------
# Autograd. The residual is kept for the backward pass and is not a result of its own.


def first_order_only(op: str) -> None:
    """Raise where a backward pass is asked to be differentiable itself."""
    # torch's once_differentiable would not do: it raises only where the incoming gradient has a
    # history, and takes the derivative with respect to the saved tensors for zero.
    if torch.is_grad_enabled():
        raise RuntimeError(f"{op} has first derivatives only; create_graph=True asks for a second")


def _topk_mse_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, index, target, _ = inputs
    residual = output[1]
    ctx.mark_non_differentiable(residual)
    ctx.save_for_backward(residual, index)
    ctx.shape, ctx.dtype, ctx.through_mean = logits.shape, logits.dtype, target == "global_mean"


def _topk_mse_backward(ctx: Any, grad: Tensor, _: Tensor | None) -> Gradients:
    first_order_only("palu::topk_mse")
    residual, index = ctx.saved_tensors
    grad_logits = grad.new_empty(ctx.shape, dtype=ctx.dtype)
    _ops.topk_mse_backward(grad, residual, index, ctx.through_mean, grad_logits)
    return grad_logits, None, None, None


torch.library.register_autograd("palu::topk_mse", _topk_mse_backward, setup_context=_topk_mse_context)


def _linear_topk_mse_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    hidden, weight, index, bias, mean, target, _ = inputs
    residual = output[1]
    ctx.mark_non_differentiable(residual)
    ctx.save_for_backward(residual, hidden, weight, index, bias, mean)
    ctx.through_mean = target == "global_mean"


def _linear_topk_mse_backward(ctx: Any, grad: Tensor, _: Tensor | None) -> Gradients:
    first_order_only("palu::linear_topk_mse")
    residual, hidden, weight, index, bias, mean = ctx.saved_tensors
    # The kernel adds to the buffers that it is given.
    buffers = [
        torch.zeros_like(t, memory_format=torch.contiguous_format) if wanted else None
        for t, wanted in zip((hidden, weight, bias), (*ctx.needs_input_grad[:2], ctx.needs_input_grad[3]), strict=True)
    ]
    _ops.linear_topk_mse_backward(grad, residual, hidden, weight, index, mean, ctx.through_mean, *buffers)
    return buffers[0], buffers[1], None, buffers[2], None, None, None


torch.library.register_autograd(
    "palu::linear_topk_mse", _linear_topk_mse_backward, setup_context=_linear_topk_mse_context
)
