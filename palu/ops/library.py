"""Load the native ops, and register their fakes and autograd formulas with torch.

Importing this module loads the extension, prebuilt or compiled just in time, so that every op is registered before
anything can trace it; `import palu` alone imports neither this module nor torch. Gradients are first-order: a second
derivative raises.
"""

import importlib
import importlib.util
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

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


@_register_fake("linear_topk_mse_frozen")
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
    return hidden.new_empty(hidden.shape[0], dtype=dtype), hidden.new_empty(hidden.shape, dtype=dtype)


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
# Autograd. The residual is kept for the backward pass. It is a result with a history, although the public functions do
# not return it: the gradient depends on it, so whoever differentiates the gradient is led to an error.


def first_order_only(op: str) -> None:
    """Raise where a backward pass is asked to be differentiable itself."""
    # torch's once_differentiable would not do: it raises only where the incoming gradient has a
    # history, and takes the derivative with respect to the saved tensors for zero.
    if torch.is_grad_enabled():
        raise RuntimeError(f"{op} has first derivatives only; create_graph=True asks for a second")


def _no_second_derivative(op: str) -> NoReturn:
    raise RuntimeError(f"palu::{op} has first derivatives only; for a second, use its twin palu.eager.{op}")


class _Gradient(torch.autograd.Function):
    """A backward pass, from tensors, as a function of its own, whose derivative raises."""

    generate_vmap_rule = True

    @staticmethod
    def forward(op: str, compute: Callable[..., Any], *tensors: Tensor | None) -> Any:
        return compute(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.op = inputs[0]

    @staticmethod
    def backward(ctx: Any, *_: Any) -> NoReturn:
        _no_second_derivative(ctx.op)

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> NoReturn:
        _no_second_derivative(ctx.op)


def _differentiable(
    op: str,
    context: Callable[[Any, tuple[Any, ...], Any], None],
    backward: Callable[..., Gradients],
    jvp: Callable[..., tuple[Tensor, Tensor]],
) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return an op with both modes of autograd, and with torch.func; as torch.ops.palu has it, it knows reverse mode.

    torch's own registration would not do: forward mode gets a tangent of zero there, and torch.func an error.
    """

    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        return getattr(_ops, op)(*args)

    methods: dict[str, Callable[..., Any]] = {
        "forward": forward,
        "setup_context": context,
        "backward": backward,
        "jvp": jvp,
    }
    members = {name: staticmethod(method) for name, method in methods.items()}
    function: Any = type(op, (torch.autograd.Function,), {**members, "generate_vmap_rule": True})

    def raw_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        context(ctx, inputs, output)
        ctx.mark_non_differentiable(output[1])

    def raw_backward(ctx: Any, *grads: Tensor | None) -> Gradients:
        if torch.is_grad_enabled():
            _no_second_derivative(op)
        return backward(ctx, *grads)

    torch.library.register_autograd(f"palu::{op}", raw_backward, setup_context=raw_context)

    # torch.compile traces no torch.autograd.Function that has a jvp; what is in it, it does.
    @torch.compiler.allow_in_graph
    def apply(*args: Any) -> tuple[Tensor, Tensor]:
        return function.apply(*args)

    return apply


def _buffer(grad: Tensor, residual: Tensor, shape: torch.Size, dtype: torch.dtype, zero: bool = False) -> Tensor:
    # Under torch.func.vmap it is batched if one of the two is, and so may be written by the op.
    new = grad[:, None] * residual[:, :1]
    return (new.new_zeros if zero else new.new_empty)(shape, dtype=dtype)


# What of the target a change of the logits moves: it is subtracted from the change.
_TARGET_OF_TANGENT = {"global_mean": "global_mean", "local_mean": "local_mean"}


def _topk_mse_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, index, target, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], index)
    ctx.save_for_forward(output[1], index)
    ctx.shape, ctx.dtype, ctx.target = logits.shape, logits.dtype, target


def _topk_mse_gradient(
    through_mean: bool, shape: torch.Size, dtype: torch.dtype, grad: Tensor, residual: Tensor, index: Tensor
) -> Tensor:
    grad_logits = _buffer(grad, residual, shape, dtype)
    _ops.topk_mse_backward(grad, residual, index, through_mean, grad_logits)
    return grad_logits


def _topk_mse_backward(ctx: Any, grad: Tensor | None, grad_residual: Tensor | None) -> Gradients:
    if grad_residual is not None:
        _no_second_derivative("topk_mse")
    if grad is None:
        return None, None, None, None
    compute = partial(_topk_mse_gradient, ctx.target == "global_mean", ctx.shape, ctx.dtype)
    return _Gradient.apply("topk_mse", compute, grad, *ctx.saved_tensors), None, None, None


def _topk_mse_jvp(ctx: Any, tangent: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    residual, index = ctx.saved_tensors
    return _tangents(residual, topk_mse(tangent, index, _TARGET_OF_TANGENT.get(ctx.target, "constant"), 0.0)[1])


def _tangents(residual: Tensor, change: Tensor) -> tuple[Tensor, Tensor]:
    """Of the loss [R] and of the residual [R, K]."""
    return 2 / max(residual.shape[1], 1) * (residual * change).sum(1), change


topk_mse = _differentiable("topk_mse", _topk_mse_context, _topk_mse_backward, _topk_mse_jvp)


def _linear_topk_mse_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    hidden, weight, index, bias, mean, target, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], hidden, weight, index, bias, mean)
    ctx.save_for_forward(output[1], hidden, weight, index, bias, mean)
    ctx.target = target


def _linear_topk_mse_gradient(
    through_mean: bool,
    wanted: tuple[bool, bool, bool],
    grad: Tensor,
    residual: Tensor,
    hidden: Tensor,
    weight: Tensor,
    index: Tensor,
    bias: Tensor | None,
    mean: Tensor | None,
) -> Gradients:
    # The kernel adds to the buffers that it is given.
    buffers = [
        _buffer(grad, residual, t.shape, t.dtype, zero=True) if t is not None and asked else None
        for t, asked in zip((hidden, weight, bias), wanted, strict=True)
    ]
    _ops.linear_topk_mse_backward(grad, residual, hidden, weight, index, mean, through_mean, *buffers)
    return tuple(buffers)


def _linear_topk_mse_backward(ctx: Any, grad: Tensor | None, grad_residual: Tensor | None) -> Gradients:
    if grad_residual is not None:
        _no_second_derivative("linear_topk_mse")
    if grad is None:
        return (None,) * 7
    wanted = (*ctx.needs_input_grad[:2], ctx.needs_input_grad[3])
    compute = partial(_linear_topk_mse_gradient, ctx.target == "global_mean", wanted)
    of_hidden, of_weight, of_bias = _Gradient.apply("linear_topk_mse", compute, grad, *ctx.saved_tensors)
    return of_hidden, of_weight, None, of_bias, None, None, None


def _change_of_logits(
    target: str,
    hidden: Tensor,
    weight: Tensor,
    index: Tensor,
    mean: Tensor | None,
    of_hidden: Tensor | None,
    of_weight: Tensor | None,
    _: None,
    of_bias: Tensor | None,
    *__: Any,
) -> Tensor:
    """How the kept logits [R, K] move against their target; they are linear in each of the three."""
    target = _TARGET_OF_TANGENT.get(target, "constant")
    changes = []
    if of_hidden is not None:
        changes.append(linear_topk_mse(of_hidden, weight, index, None, mean, target, 0.0)[1])
    if of_weight is not None:
        mean = of_weight.mean(0, dtype=acc_dtype(of_weight.dtype))
        changes.append(linear_topk_mse(hidden, of_weight, index, None, mean, target, 0.0)[1])
    if of_bias is not None:
        changes.append(topk_mse(of_bias.expand(len(hidden), -1), index, target, 0.0)[1])
    return torch.stack(changes).sum(0)


def _linear_topk_mse_jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, Tensor]:
    residual, hidden, weight, index, _, mean = ctx.saved_tensors
    return _tangents(residual, _change_of_logits(ctx.target, hidden, weight, index, mean, *tangents))


linear_topk_mse = _differentiable(
    "linear_topk_mse", _linear_topk_mse_context, _linear_topk_mse_backward, _linear_topk_mse_jvp
)


# The same op where the head has no gradient: the second result is the loss's gradient for hidden.


def _frozen_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, target, constant = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1])
    ctx.save_for_forward(*tensors)
    ctx.target, ctx.constant, ctx.dtype = target, constant, tensors[0].dtype


def _frozen_gradient(dtype: torch.dtype, grad: Tensor, grad_hidden: Tensor) -> Tensor:
    return (grad[:, None] * grad_hidden).to(dtype)


def _frozen_backward(ctx: Any, grad: Tensor | None, of_gradient: Tensor | None) -> Gradients:
    if of_gradient is not None:
        _no_second_derivative("linear_topk_mse")
    if grad is None:
        return (None,) * 7
    compute = partial(_frozen_gradient, ctx.dtype)
    return _Gradient.apply("linear_topk_mse", compute, grad, *ctx.saved_tensors), *(None,) * 6


def _frozen_jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, Tensor]:
    hidden, weight, index, bias, mean = ctx.saved_tensors
    residual = linear_topk_mse(hidden, weight, index, bias, mean, ctx.target, ctx.constant)[1]
    loss, _ = _tangents(residual, _change_of_logits(ctx.target, hidden, weight, index, mean, *tangents))
    # The gradient's own tangent is asked for by a second derivative alone, which raises where it finds one.
    return loss, torch.zeros_like(hidden, dtype=loss.dtype)


linear_topk_mse_frozen = _differentiable("linear_topk_mse_frozen", _frozen_context, _frozen_backward, _frozen_jvp)
