"""Calls of the ops through torch: good arguments in any memory layout, whose results are compared, and bad ones.

A tensor lies alone in its allocation, where a sanitizer sees an access just outside, or it is a view of a larger one,
whose poison (NaN, an index out of range) shows in the result.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from helpers import op_cases
from helpers.compare import compare
from helpers.op_cases import DTYPES, Draw, Inputs, OpCase, Outputs, describe, is_floating
from torch import Tensor

from palu import ops
from palu.eager import acc_dtype
from palu.ops.functional import use_gather

SOFTMAX_LOSSES = ("cross_entropy_", "kl_div_")
TOPK_LOSSES = ("topk_mse", "topk_unlikelihood")
LINEAR_LOSSES = ("linear_topk_mse", "linear_topk_unlikelihood")
OPS = ("prefix_mask", *TOPK_LOSSES, *LINEAR_LOSSES, *SOFTMAX_LOSSES)
WRITTEN = ("grad_logits", "grad_hidden", "grad_weight", "grad_bias")
CPU = torch.device("cpu")

raw = torch.ops.palu


@dataclass
class Call:
    """One way to call an op: some of its inputs, and which of them it overwrites."""

    name: str  # of the op whose arguments they are
    case: OpCase
    arguments: Inputs
    written: tuple[str, ...]
    run: Callable[[Inputs], Outputs]  # what is not written; the rest is read from the arguments
    finite: bool = True  # else there is nothing to compare, but no reason to crash
    slack: float = 1.0  # times the scale of an error

    def tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.arguments.items() if isinstance(value, Tensor)}

    def __str__(self) -> str:
        strided = {name: t for name, t in self.tensors().items() if t.layout == torch.strided}
        told = (f"{name}={describe(value)}" for name, value in self.arguments.items())
        strides = (f"{name} {list(t.stride())}" for name, t in strided.items())
        return f"{self.name}({', '.join(told)}), strides {', '.join(strides)}; of {self.case.op}"


# ------------------------------------------------------------------------------------------ good calls


def draw_call(draw: Draw, op: str, device: torch.device = CPU) -> Call:
    """Draw a call of an op, its tensors on a device in any layout that the op takes."""
    by_autograd = draw.chance(0.6)
    if op in SOFTMAX_LOSSES:
        case = op_cases.softmax_loss(draw, op)
    elif op in LINEAR_LOSSES:
        case = op_cases.linear_topk(draw, op, start=not by_autograd)
    elif op in TOPK_LOSSES:
        case = op_cases.topk(draw, op)
    else:
        case = op_cases.prefix_mask(draw)
    for t in case.inputs.values():  # some with equal rows, which may be one row, expanded
        if isinstance(t, Tensor) and len(t) and draw.chance(0.1):
            t.copy_(t[:1].clone().expand_as(t))
    call = _CALLS.get(op, _plain)(draw, case, by_autograd)
    for name, value in call.tensors().items():
        call.arguments[name] = place(draw, value.to(device), buffer=name in call.written)
    floating = [t for name, t in call.tensors().items() if is_floating(t) and t.numel() and 0 not in t.stride()]
    if floating and draw.chance(0.01):
        draw.one(*floating)[..., -1] = draw.one(math.inf, -math.inf, math.nan)
        call.finite = False
    return call


def _plain(_: Draw, case: OpCase, __: bool) -> Call:
    output, written = ("mask", ()) if case.op == "prefix_mask" else ("loss", ("logits",))
    call = Call(case.op, case, dict(case.inputs), written, lambda a: {output: getattr(ops, case.op)(**a)})
    if case.op == "kl_div_":  # a CPU's BLAS sums a row's products one after the other
        call.slack = 4 + case.inputs["logits"].shape[1] / 512
    return call


def _topk(_: Draw, case: OpCase, by_autograd: bool) -> Call:
    a = dict(case.inputs)
    grad, logits = a.pop("grad"), a["logits"]
    if by_autograd:
        function = getattr(ops, case.op)
        return Call(case.op, case, a, (), lambda a: _with_gradients(function, a, ["logits"], grad))
    slope = case.expected()["slope"][0].to(grad.dtype)
    a = {"grad": grad, "slope": slope, "index": a["index"], "through_mean": a.get("target") == "global_mean"}
    a["grad_logits"] = torch.full_like(logits, math.nan)
    return Call("topk_backward", case, a, ("grad_logits",), lambda a: raw.topk_backward(**a) or {})


def _linear_topk(draw: Draw, case: OpCase, by_autograd: bool) -> Call:
    a = {name: case.inputs[name] for name in ("hidden", "weight", "bias", "index")}
    grads = {name: case.inputs[name] for name in WRITTEN[1:]}
    grad, target = case.inputs["grad"], case.inputs.get("target")
    mean = None if target is None else ops.weight_mean(a["weight"])
    asked = [name.removeprefix("grad_") for name, t in grads.items() if t is not None]
    if by_autograd:
        a["impl"] = draw.one("auto", "gather", "dense")
        if target is None:
            a["floor"] = case.inputs["floor"]
        else:
            a |= {"target": target, "weight_mean": draw.one(None, mean)}
        dense, exact = not use_gather(a["impl"], a["index"], a["weight"]), acc_dtype(case.dtype)
        if dense and case.dtype != exact and a.get("floor"):  # rounded logits may lie on the floor's other side
            a["impl"], dense = "gather", False
        function = getattr(ops, case.op)
        call = Call(case.op, case, a, (), lambda a: _with_gradients(function, a, asked, grad))
        if dense:  # the logits and their gradient are rounded
            call.slack += torch.finfo(case.dtype).eps / torch.finfo(exact).eps
        return call
    del a["bias"]
    slope = case.expected()["slope"][0].to(grad.dtype)
    a |= {"grad": grad, "slope": slope, "weight_mean": mean, "through_mean": target == "global_mean", **grads}
    written = tuple(f"grad_{name}" for name in asked)
    return Call("linear_topk_backward", case, a, written, lambda a: raw.linear_topk_backward(**a) or {})


_CALLS = dict.fromkeys(TOPK_LOSSES, _topk) | dict.fromkeys(LINEAR_LOSSES, _linear_topk)


def _with_gradients(function: Callable[..., Tensor], a: Inputs, asked: list[str], grad: Tensor) -> Outputs:
    leaves = {name: a[name].detach().requires_grad_(is_floating(a[name])) for name in asked}
    loss = function(**(a | leaves))
    if not leaves:
        assert not loss.requires_grad
        return {"loss": loss}
    gradients = torch.autograd.grad(loss, list(leaves.values()), grad.to(loss.device))
    return {"loss": loss.detach()} | {f"grad_{name}": g for name, g in zip(leaves, gradients, strict=True)}


def place(draw: Draw, values: Tensor, *, buffer: bool = False) -> Tensor:
    """Put `values` into a random memory layout, which the values decide: none is changed.

    A `buffer` is one that every op can write: unit stride in the last dimension, rows apart.
    """
    shape, dims = values.shape, values.dim()
    layouts = ["exact", "slice", "slice"]
    if dims and not buffer:
        layouts += ["steps", "transposed"]
        if values.dtype in (torch.float32, torch.float64):
            layouts.append("negated")
        if dims == 2 and shape[0] > 1 and (values == values[:1]).all():
            layouts += 9 * ["expanded"]
    layout = draw.one(*layouts)
    if layout == "negated":  # torch's lazy negation, which it resolves before a kernel sees it
        return torch._neg_view(-values)
    if layout == "expanded":
        return values[:1].clone().expand(shape)
    if layout == "exact":
        view = values.clone(memory_format=torch.contiguous_format)
    elif layout == "transposed":
        whole = values.new_full([n + draw.one(0, 0, 3) for n in reversed(shape)], _poison(values.dtype))
        view = whole.permute(*reversed(range(dims)))
    else:
        steps = [draw.one(1, 2, 3) if layout == "steps" else 1 for _ in shape]
        before = [draw.one(0, 1, 3) for _ in shape]
        sizes = [b + n * s + draw.one(0, 2) for b, n, s in zip(before, shape, steps, strict=True)]
        view = values.new_full(sizes, _poison(values.dtype))
        view = view[tuple(slice(b, None, s) for b, s in zip(before, steps, strict=True))]
    view = view[tuple(slice(n) for n in shape)]
    view.copy_(values)
    if 1 in shape and draw.chance(0.3):  # the stride of a single element means nothing
        odd = draw.one(0, 7, 10**6)
        strides = [odd if n == 1 else s for n, s in zip(shape, view.stride(), strict=True)]
        view = view.as_strided(shape, strides, view.storage_offset())
    return view


def _poison(dtype: torch.dtype) -> float | int:
    """NaN, or an index that is none; in bfloat16 a large number.

    On CPUs with AMX torch multiplies what lies behind a row of bfloat16 by zero (oneDNN issue 5717): NaN survives it.
    """
    if not dtype.is_floating_point:
        return 2**31 - 1
    return 2.0**100 if dtype == torch.bfloat16 else math.nan


def memory(t: Tensor) -> Tensor:
    """Return a copy of all bytes of the allocation that `t` lies in."""
    return torch.empty(0, dtype=torch.uint8, device=t.device).set_(t.untyped_storage()).clone()


def accept(call: Call) -> None:
    """Run a call with good arguments: its outputs must be right, and nothing else may change."""
    tensors = call.tensors()
    copies = {name: tensors[name].clone() for name in call.written}
    before = {name: memory(t) for name, t in tensors.items()}
    found = call.run(call.arguments)
    found |= {name: call.arguments[name].clone() for name in call.written}
    for name, values in copies.items():  # then everything else must be as it was
        tensors[name].copy_(values)
    for name, bytes_ in before.items():
        assert torch.equal(memory(tensors[name]), bytes_), f"{name} was changed outside of what is written"
    expected = call.case.expected() if call.finite else {}
    for name, result in found.items() if expected else ():
        truth, plain, scale = expected[name]
        assert result.shape == truth.shape, f"{name}: {list(result.shape)} instead of {list(truth.shape)}"
        assert result.dtype == (acc_dtype(call.case.dtype) if name == "loss" else call.case.dtype), name
        wrong, _ = compare(result.cpu(), truth, plain, None if scale is None else scale * call.slack)
        assert not wrong, f"{name}: {wrong}"


# ------------------------------------------------------------------------------------------ bad arguments


@dataclass
class Bad:
    """One bad argument, and what it must raise."""

    what: str
    change: Callable[[Inputs], Any]  # in place
    errors: tuple[type[Exception], ...]
    field: str = ""  # which the error must name


def refuse(call: Call, bad: Bad) -> None:
    """Run a call with a bad argument: it must raise, name the argument, and change nothing."""
    bad.change(call.arguments)
    there = {n: t for n, t in call.tensors().items() if t.layout == torch.strided and not t.is_meta}
    before = {name: memory(t) for name, t in there.items()}
    try:
        call.run(call.arguments)
    except bad.errors as error:
        raised: Exception = error
    else:
        raise AssertionError("accepted")
    # What torch raises itself, for a sparse tensor or a label out of range, it says in its own words.
    assert bad.field in str(raised) or type(raised) in (NotImplementedError, RuntimeError), raised
    for name, bytes_ in before.items():
        assert torch.equal(memory(there[name]), bytes_), f"{name} was changed all the same"


NOT_FLOATS = (torch.float16, torch.int32, torch.int64, torch.bool)  # float16 on a CPU
NOT_INDICES = (torch.int16, torch.uint8, torch.bool, torch.float32, torch.float64)
# Dimensions of tensors: rows, vocabulary, hidden size, candidates.
SHAPES = dict.fromkeys(("logits", "ref_logits", "grad_logits"), "RV") | dict.fromkeys(("index", "slope"), "RK")
SHAPES |= dict.fromkeys(("hidden", "grad_hidden"), "RH") | dict.fromkeys(("weight", "grad_weight"), "VH")
SHAPES |= dict.fromkeys(("labels", "row_weight", "grad"), "R") | dict.fromkeys(("bias", "grad_bias"), "V")
SHAPES["weight_mean"] = "H"
BAD_FLOORS = (1.0, -0.5, math.nan)
NO_FLOORS = ("0.1", None, [0.1], 1j, True)
BAD_IMPLS = ("", "Dense", None)
BAD_TARGETS = ("mean", "constant", "", "GLOBAL_MEAN", None, [1.0], 1j, math.nan, True)
SETTINGS: dict[str, list[tuple[str, tuple[Any, ...], type[Exception]]]] = {
    "prefix_mask": [
        ("n", (-2, -(2**63)), ValueError),
        ("n", (1.5, None, 2**63), TypeError),
        ("eos_token_id", (1.5, "2", -(2**64)), TypeError),
    ],
    "topk_mse": [("target", BAD_TARGETS, ValueError)],
    "linear_topk_mse": [("target", BAD_TARGETS, ValueError), ("impl", BAD_IMPLS, ValueError)],
    "topk_unlikelihood": [("floor", BAD_FLOORS, ValueError), ("floor", NO_FLOORS, TypeError)],
    "linear_topk_unlikelihood": [
        ("floor", BAD_FLOORS, ValueError),
        ("floor", NO_FLOORS, TypeError),
        ("impl", BAD_IMPLS, ValueError),
    ],
}


def bad_arguments(draw: Draw, call: Call) -> list[Bad]:
    """List what the call must refuse: one argument of another dtype, rank, size, device, layout or value."""
    found = [bad for name in call.tensors() for bad in _bad_tensor(draw, call, name)]
    found += [bad for name in call.written for bad in _bad_buffer(draw, call.arguments[name], name)]
    sizes = [(name, dim, size) for name in call.tensors() for dim, size in enumerate(SHAPES[name])]
    shared = Counter(size for _, _, size in sizes)
    found += [_length(draw, name, dim) for name, dim, size in sizes if shared[size] > 1]
    for name, values, error in SETTINGS.get(call.name, []):
        value = draw.one(*values)
        found.append(Bad(f"{name} = {value!r}", lambda a, n=name, v=value: a.update({n: v}), (error,), field=name))
    if any(t.shape[0] for t in call.tensors().values()) and call.name in (*TOPK_LOSSES, *SOFTMAX_LOSSES):
        both = ("logits", "ref_logits")
        none = {name: t[:, :0] for name, t in call.tensors().items() if name in both}
        found.append(Bad("V = 0", lambda a: a.update(none), (ValueError,)))
    return found


def _bad_tensor(draw: Draw, call: Call, name: str) -> Iterator[Bad]:
    t = call.arguments[name]
    lead = next(n for n in ("labels", "grad_logits", "logits", "hidden") if n in call.arguments)

    def change(what: str, value: Tensor, *errors: type[Exception]) -> Bad:
        return Bad(f"{name} {what}", lambda a: a.update({name: value}), errors, field=name)

    if name == "labels":
        dtypes: tuple[torch.dtype, ...] = (torch.int32, *NOT_INDICES)
    elif name == "index":
        dtypes = NOT_INDICES
    elif name == lead or (name == "logits" and call.name in SOFTMAX_LOSSES):
        dtypes = NOT_FLOATS if t.device.type == "cpu" else NOT_FLOATS[1:]
    else:
        dtypes = tuple(d for d in (*DTYPES, *NOT_FLOATS) if d != t.dtype)
    dtype = draw.one(*dtypes)
    yield change(f"in {dtype}", t.to(dtype), TypeError)
    yield change("of another rank", draw.one(t[None], t[..., None], t.new_zeros(())), ValueError)
    if len(call.tensors()) > 1:
        yield change("on another device", t.to("meta"), ValueError)
    yield change("sparse", t.to_sparse(), TypeError, NotImplementedError)  # the latter from the dispatcher
    if name not in ("index", "labels") or not t.numel() or t.device.type != "cpu" or call.name == "prefix_mask":
        return  # on CUDA a value out of range is a device-side assertion
    bound = next(
        call.arguments[n].shape[d] for n, d in (("weight", 0), ("logits", 1), ("grad_logits", 1)) if n in call.arguments
    )
    wrong = t.clone(memory_format=torch.contiguous_format)
    value = draw.one(bound, -1, torch.iinfo(t.dtype).min, torch.iinfo(t.dtype).max)
    wrong.view(-1)[draw.random.randrange(t.numel())] = value
    yield change("out of range", wrong, *((IndexError,) if name == "index" else (IndexError, RuntimeError)))
    if name == "index":
        least = 1 + call.name.endswith("unlikelihood")
        yield change(f"with K = {least - 1}", t[:, : least - 1], ValueError)


def _length(draw: Draw, name: str, dim: int) -> Bad:
    by = draw.one(-1, 1, 17)

    def change(a: Inputs) -> None:
        shape = list(a[name].shape)
        shape[dim] = abs(shape[dim] + by)
        a[name] = a[name].new_zeros(shape)

    return Bad(f"{name} longer or shorter in dimension {dim}", change, (ValueError,))


def _bad_buffer(draw: Draw, t: Tensor, name: str) -> Iterator[Bad]:
    """Yield what no written argument may be."""

    def change(what: str, value: Tensor) -> Bad:
        return Bad(f"{name} {what}", lambda a: a.update({name: value}), (ValueError,), field=name)

    yield Bad(f"{name} requires grad", lambda a: a[name].requires_grad_(), (RuntimeError,))
    if t.numel() and t.shape[0] > 1:
        # Rows that are one and the same, or that start inside one another.
        width = t.shape[-1]
        strides = [(0,)] if t.dim() == 1 else [(0, 1), *([(1, 1), (width - 1, 1)] if width > 1 else [])]
        yield change("overlapping itself", t.new_ones(t.numel()).as_strided(t.shape, draw.one(*strides)))
        if width > 1:
            yield change("in steps", t.new_ones((*t.shape[:-1], 2 * width))[..., ::2])


# ------------------------------------------------------------------------------------------ both


def try_one(seed: int, op: str, device: torch.device = CPU, bad: bool = False, about: Callable[..., Any] = list) -> str:
    """Draw a call and make it, with a bad argument or without; return its name. `about` gets its text before."""
    dtypes = tuple(d for d in DTYPES if d != torch.float16 or device.type == "cuda")
    draw = Draw(seed, dtypes)
    call = draw_call(draw, op, device)
    wrong = draw.one(*bad_arguments(draw, call)) if bad else None
    told = f"seed {seed}: {call}{f', bad: {wrong.what}' if wrong else ''}"
    about(told)
    try:
        refuse(call, wrong) if wrong else accept(call)
    except Exception as error:
        error.add_note(told)
        raise
    return call.name
