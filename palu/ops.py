"""The native ops: loading, fakes, autograd and the functions users call.

Importing this module loads the extension, prebuilt or compiled just in time, so that every op is
registered before anything can trace it; `import palu` alone imports neither this module nor torch.
Gradients are first-order: a second derivative raises.
"""

import importlib
import importlib.util
import math
import warnings
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from palu import _build, reference
from palu.config import TARGETS
from palu.reference import acc_dtype

Gradients = tuple[Tensor | None, ...]

__all__ = ["extension_path", "linear_topk_mse", "prefix_mask", "topk_mse", "weight_mean"]


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


def extension_path() -> str:
    """Path of the extension that is loaded: the prebuilt module, or the one compiled just in time."""
    return _extension_path


# ---------------------------------------------------------------------------------------------------
# Public functions


def prefix_mask(labels: Tensor, n: int, eos_token_id: int | None = None) -> Tensor:
    """Mark the onset tokens: the first `n` of every sensitive span.

    A label is sensitive if it is a token id (not negative) other than `eos_token_id`; a span is a
    maximal run of neighbouring sensitive labels in a row (PALU, arXiv 2601.03190, temporal sparsity).

    Args:
        labels: [B, T] int64.
        n: tokens to mark per span; -1 marks all of them, 0 none.
        eos_token_id: a label that is never sensitive.

    Returns:
        [B, T] bool.

    Raises:
        TypeError: `labels` are not int64, or `n` or `eos_token_id` is no integer.
        ValueError: `labels` have not two dimensions, or `n` is below -1.
    """
    check_tensors("palu::prefix_mask", labels=labels)
    for name, value in (("n", n), ("eos_token_id", -1 if eos_token_id is None else eos_token_id)):
        if not isinstance(value, Integral) or not -(2**63) <= value < 2**63:
            raise TypeError(f"palu::prefix_mask: {name} must be one integer of 64 bits, got {value!r}")
    return _ops.prefix_mask(labels, n, eos_token_id)


def topk_mse(logits: Tensor, index: Tensor, target: str | float = "global_mean") -> Tensor:
    """Local entropy loss: mean squared distance of the kept logits from a common target.

    `loss[r] = (1/K) sum_k (logits[r, index[r, k]] - c[r])^2` (PALU, arXiv 2601.03190, L_local), where
    `target` chooses c: "global_mean" (the row's mean over the vocabulary, gradient flows through it),
    "global_mean_detached", "local_mean" (the mean of the kept logits) or a number.

    Args:
        logits: [R, V] float32, float64, bfloat16, or on CUDA float16; any strides.
        index: [R, K] int32 or int64, each in [0, V); one that occurs twice counts twice.
        target: what the kept logits are pulled towards.

    Returns:
        [R], float64 for float64 logits and float32 otherwise.

    Raises:
        TypeError: a dtype not listed above.
        ValueError: shapes that do not fit, K = 0, V = 0, different devices, or an unknown target.
        IndexError: an index out of range (CPU; on CUDA a device-side assertion).
    """
    check_tensors("palu::topk_mse", logits=logits, index=index)
    loss, _ = _ops.topk_mse(logits, index, *_split_target(target))
    return loss


def linear_topk_mse(
    hidden: Tensor,
    weight: Tensor,
    index: Tensor,
    target: str | float = "global_mean",
    bias: Tensor | None = None,
    *,
    weight_mean: Tensor | None = None,
) -> Tensor:
    """`topk_mse` of the logits `hidden @ weight.T + bias`, without forming them.

    Only the kept logits are computed. The mean over the vocabulary needs none:
    `mean_v z_v = hidden . weight.mean(0) + bias.mean()`.

    Args:
        hidden: [R, d] float32, float64, bfloat16, or on CUDA float16.
        weight: [V, d], the dtype of `hidden`.
        index: [R, K] int32 or int64, each in [0, V).
        target: as in `topk_mse`.
        bias: [V], the dtype of `hidden`.
        weight_mean: [d], what `palu.ops.weight_mean(weight)` returns, computed here if not given. Pass
            it when the head is frozen, to save a pass over it. It must be the mean of `weight`:
            gradients through it go to `weight`, and none to this argument.

    Returns:
        [R], float64 for float64 inputs and float32 otherwise.

    Raises:
        TypeError: a dtype not listed above, or different dtypes.
        ValueError: shapes that do not fit, K = 0, V = 0, different devices, or an unknown target.
        IndexError: an index out of range (CPU; on CUDA a device-side assertion).
    """
    optional = {"bias": bias, "weight_mean": weight_mean}
    given = {name: tensor for name, tensor in optional.items() if tensor is not None}
    check_tensors("palu::linear_topk_mse", hidden=hidden, weight=weight, index=index, **given)
    path = _gather
    if hidden.dim() == index.dim() == weight.dim() == 2:  # else the op reports it
        (rows, k), (vocab_size, hidden_size) = index.shape, weight.shape
        if not _gather_is_faster(rows, k, vocab_size, hidden_size, hidden.device.type):
            path = _dense
    return path(hidden, weight, index, target, bias, weight_mean)


def weight_mean(weight: Tensor) -> Tensor:
    """Mean row of a head, `weight.mean(0)`: [d] from [V, d], float64 for float64 and else float32."""
    return weight.detach().mean(0, dtype=acc_dtype(weight.dtype))


def _gather_is_faster(
    rows: int, k: int, vocab_size: int, hidden_size: int, device_type: str, beside_dense: bool = False
) -> bool:
    """Whether gathering the kept rows of the head beats the dense product.

    On a CPU the arithmetic of the dense product decides, and the gather wins (with 2 cores up to about rows * k =
    5 vocab_size, where they are even). On a GPU both are bound by the bytes of the head that they move: rows * k of
    its rows, or each once. (Measured on an H100, d = 4096, bfloat16: gathering takes 3.3 ns per kept logit, the
    dense product of few rows 0.41 to 0.46 ms, so they meet near rows * k = vocab_size = 128256.)
    `beside_dense`: other rows go through a dense product anyway; on a GPU a few more rows then cost next to nothing.
    """
    if device_type == "cpu":
        return True
    return not beside_dense and rows * k < vocab_size


def _gather(
    hidden: Tensor,
    weight: Tensor,
    index: Tensor,
    target: str | float,
    bias: Tensor | None,
    mean: Tensor | None,
) -> Tensor:
    name, constant = _split_target(target)
    if mean is None and name.startswith("global_mean"):
        mean = weight_mean(weight)
    loss, _ = _ops.linear_topk_mse(hidden, weight, index, bias, mean, name, constant)
    return loss


def _dense(
    hidden: Tensor,
    weight: Tensor,
    index: Tensor,
    target: str | float,
    bias: Tensor | None,
    mean: Tensor | None,
) -> Tensor:
    with torch.no_grad():  # the other path's checks, on no rows: linear() would say less of what is wrong
        _ops.linear_topk_mse(hidden[:0], weight, index[:0], bias, mean, "constant", 0.0)
    return topk_mse(F.linear(hidden, weight, bias), index, target)


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


def _split_target(target: str | float) -> tuple[str, float]:
    """The ops' pair of target name and constant."""
    if isinstance(target, str) and target in TARGETS:
        return target, 0.0
    if isinstance(target, bool) or not isinstance(target, Real) or not math.isfinite(target):
        raise ValueError(f"unknown target {target!r}; choose one of {', '.join(TARGETS)}, or a finite number")
    return "constant", float(target)


# ---------------------------------------------------------------------------------------------------
# Fakes: shapes and dtypes for torch.compile


def _register_fake(op: str) -> Callable[[Callable[..., Any]], None]:
    """Registers a fake, which is the op's kernel for meta tensors too.

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


def _loss_of_rows(logits: Tensor, _: Tensor, row_weight: Tensor, reverse: bool = False) -> Tensor:
    return torch.empty_like(row_weight, memory_format=torch.contiguous_format)


_register_fake("cross_entropy_")(_loss_of_rows)
_register_fake("kl_div_")(_loss_of_rows)


# ---------------------------------------------------------------------------------------------------
# Autograd. The residual is kept for the backward pass and is not a result of its own.


def _first_order_only(op: str) -> None:
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
    _first_order_only("palu::topk_mse")
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
    _first_order_only("palu::linear_topk_mse")
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


# ---------------------------------------------------------------------------------------------------
# CPU kernels written in torch


def _check_rows(op: str, logits: Tensor, row_weight: Tensor, **others: tuple[Tensor, torch.dtype, Any]) -> None:
    """What csrc/checks.h asks of the arguments on CUDA."""
    if logits.dtype not in (torch.float32, torch.float64, torch.bfloat16):
        raise TypeError(
            f"palu::{op}: logits must be float32, float64 or bfloat16 on the CPU, got {_name(logits.dtype)}"
        )
    if logits.dim() != 2:
        raise ValueError(f"palu::{op}: logits must have 2 dimensions, got shape {list(logits.shape)}")
    if logits.shape[0] and not logits.shape[1]:
        raise ValueError(f"palu::{op}: the vocabulary is empty")
    if logits.shape[0]:
        (rows, columns), (row_stride, stride) = logits.shape, logits.stride()
        if columns > 1 and stride != 1:
            raise ValueError(
                f"palu::{op}: logits must have unit stride in its last dimension, got strides {list(logits.stride())}"
            )
        if rows > 1 and row_stride < columns:
            raise ValueError(
                f"palu::{op}: logits must not have rows that overlap, got shape {list(logits.shape)} and strides "
                f"{list(logits.stride())}"
            )
    if logits.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(f"palu::{op}: logits requires grad and would be overwritten; use torch.no_grad()")
    others["row_weight"] = (row_weight, acc_dtype(logits.dtype), logits.shape[:1])
    check_tensors(f"palu::{op}", logits=logits, **{name: tensor for name, (tensor, _, _) in others.items()})
    for name, (tensor, dtype, shape) in others.items():
        if tensor.dtype != dtype:
            raise TypeError(f"palu::{op}: {name} must be {_name(dtype)}, got {_name(tensor.dtype)}")
        if tensor.shape != shape:
            raise ValueError(f"palu::{op}: {name} must have shape {list(shape)}, got {list(tensor.shape)}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@torch.library.impl("palu::cross_entropy_", "cpu")
def _(logits: Tensor, labels: Tensor, row_weight: Tensor) -> Tensor:
    _check_rows("cross_entropy_", logits, row_weight, labels=(labels, torch.int64, logits.shape[:1]))
    return reference.cross_entropy_(logits, labels, row_weight)


@torch.library.impl("palu::kl_div_", "cpu")
def _(logits: Tensor, ref_logits: Tensor, row_weight: Tensor, reverse: bool) -> Tensor:
    _check_rows("kl_div_", logits, row_weight, ref_logits=(ref_logits, logits.dtype, logits.shape))
    return reference.kl_div_(logits, ref_logits, row_weight, reverse)


# ---------------------------------------------------------------------------------------------------
# Losses whose gradient is formed in the forward pass (palu/losses.py); no autograd


def topk_mse_(logits: Tensor, index: Tensor, row_weight: Tensor, target: str | float) -> Tensor:
    """`topk_mse` of each row [R]; `logits` [R, V] become its gradient times `row_weight` [R]."""
    name, constant = _split_target(target)
    loss, residual = _ops.topk_mse(logits, index, name, constant)
    _ops.topk_mse_backward(row_weight, residual, index, name == "global_mean", logits)
    return loss


def linear_topk_mse_(
    hidden: Tensor,
    weight: Tensor,
    index: Tensor,
    row_weight: Tensor,
    target: str | float,
    bias: Tensor | None,
    mean: Tensor | None,
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> Tensor:
    """`linear_topk_mse` of each row [R]; its gradient times `row_weight` [R] is added to `grads`.

    `grads` are those of hidden [R, d], weight [V, d] and bias [V]; None: not asked for.
    """
    name, constant = _split_target(target)
    if mean is None and name.startswith("global_mean"):
        mean = weight_mean(weight)
    loss, residual = _ops.linear_topk_mse(hidden, weight, index, bias, mean, name, constant)
    _ops.linear_topk_mse_backward(row_weight, residual, hidden, weight, index, mean, name == "global_mean", *grads)
    return loss


cross_entropy_ = _ops.cross_entropy_
kl_div_ = _ops.kl_div_


def scale_(tensor: Tensor, factor: Tensor) -> None:
    """Multiply a tensor in place by a scalar tensor: free where that is 1, and without waiting for a GPU."""
    if tensor.is_cuda:
        _ops.scale_(tensor, factor)
    elif factor != 1:
        tensor.mul_(factor)
