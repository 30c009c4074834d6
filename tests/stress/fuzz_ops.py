"""Random calls of every op: shapes, strides, dtypes and bad arguments. Not a pytest file; `make sanitize` runs it.

A call with good arguments must agree with plain torch in float64 and write nothing outside its buffers. One with a
bad argument must raise the right exception and change nothing. Some tensors fill their allocation, where the sanitizer
sees an access just outside; the others are views of larger ones, whose poison (NaN, an index out of range) shows in
the result. `--sanitize` builds the ops with AddressSanitizer and UBSan, without it they are the usual ones.
"""

import argparse
import math
import os
import random
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Arguments = dict[str, Any]
Shape = tuple[int, ...]


def sanitized_environment() -> dict[str, str]:
    """What a process needs to load the sanitized ops: Python itself is not instrumented."""
    from torch.utils import cpp_extension

    def library(name: str) -> str:
        command = [cpp_extension.get_cxx_compiler(), f"-print-file-name={name}"]
        return subprocess.run(command, capture_output=True, check=True, text=True).stdout.strip()

    return {
        "PALU_SANITIZE": "1",
        # Without libstdc++ beside it, ASan finds no __cxa_throw to intercept, and the first exception aborts.
        "LD_PRELOAD": f"{library('libasan.so')} {library('libstdc++.so')}",
        # Python and torch leave memory to the end of the process.
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0, help="of the first case; the next one has the next seed")
    parser.add_argument("--sanitize", action="store_true", help="build the ops with AddressSanitizer and UBSan")
    parser.add_argument("--record", help=argparse.SUPPRESS)  # the child's: where it writes what it is about to do
    options = parser.parse_args()
    if options.record:
        return Fuzzer(options.seed, options.cases, options.record).run()
    with tempfile.NamedTemporaryFile("r") as record:
        environment = os.environ | (sanitized_environment() if options.sanitize else {})
        command = [sys.executable, *sys.argv, "--record", record.name]
        code = subprocess.run(command, env=environment, check=False).returncode
        if code and (last := record.read().rstrip("\0\n")):
            print(f"the process ended (exit status {code}) in\n{last}", file=sys.stderr)
    return code


if __name__ == "__main__" and "--record" not in sys.argv:
    sys.exit(main())

os.environ.pop("LD_PRELOAD", None)  # not for the compilers that this process starts
sys.modules["palu._C"] = None  # type: ignore[assignment]  # the ops built from these sources, nothing prebuilt

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

from palu import _build, eager, ops  # noqa: E402
from palu.eager import acc_dtype  # noqa: E402
from palu.ops import fused  # noqa: E402
from palu.ops.functional import use_gather  # noqa: E402

raw = torch.ops.palu
FLOATS = [torch.float32, torch.float64, torch.bfloat16]
NOT_FLOATS = [torch.float16, torch.int32, torch.int64, torch.bool, torch.complex64]
NOT_INDICES = [torch.int16, torch.uint8, torch.bool, torch.float32, torch.float64]
TARGETS = ["global_mean", "global_mean_detached", "local_mean", 0.5, -3, 0.0]
EXTREMES = [-(2**63), 2**63 - 1]


@dataclass
class Bad:
    """One bad argument, and what it must raise."""

    what: str
    change: Callable[[Arguments], Any]  # in place
    errors: tuple[type[Exception], ...]


@dataclass
class Call:
    """One op with good arguments."""

    op: str
    run: Callable[[Arguments], list[Tensor]]  # the results; then the written arguments follow in the comparison
    truth: Callable[[Arguments], list[Tensor]]  # of the results and the written arguments
    arguments: Arguments
    written: list[str] = field(default_factory=list)
    error: float = 0.0  # allowed besides the rounding of each value to its dtype
    bad: list[Bad] = field(default_factory=list)

    def tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.arguments.items() if isinstance(value, Tensor)}

    def __str__(self) -> str:
        return f"{self.op}({', '.join(f'{name}={describe(value)}' for name, value in self.arguments.items())})"


def describe(value: Any) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    where = f", {value.device.type}" if value.device.type != "cpu" else ""
    strides = f"strides {list(value.stride())}" if value.layout == torch.strided else str(value.layout)
    return f"<{str(value.dtype).removeprefix('torch.')} {list(value.shape)}, {strides}{where}>"


class Draw:
    """Random sizes, values and memory layouts."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        torch.manual_seed(seed)

    def one(self, *choices: Any) -> Any:
        return self.random.choice(choices)

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def size(self, least: int = 0) -> int:
        """Mostly small; around powers of two, where loops change; seldom 0."""
        kind = self.random.random()
        if kind < 0.04:
            return least
        if kind < 0.7:
            return self.random.randint(1, 9)
        if kind < 0.95:
            return self.random.randint(10, 70)
        return self.one(127, 128, 129, 255, 257)

    def rows_and_vocabulary(self) -> tuple[int, int, int]:
        """R, V and K; without rows the others may be 0."""
        rows = self.size()
        if rows and self.chance(0.02):  # past the block of a sum, or enough for a second thread
            return min(rows, 5), self.one(2047, 2048, 2049, 40_001), self.size(1)
        return rows, self.size(int(rows > 0)), self.size(int(rows > 0))

    def floating(self) -> torch.dtype:
        return self.one(*FLOATS)

    def normal(self, shape: Shape, dtype: torch.dtype, *, buffer: bool = False) -> Tensor:
        values = (torch.randn(shape) * self.one(1, 1, 5)).to(dtype)
        if values.numel() and self.chance(0.01):  # no result to compare, but no reason to crash
            values.view(-1)[self.random.randrange(values.numel())] = self.one(math.inf, -math.inf, math.nan)
        return self.place(values, lambda: math.nan, buffer=buffer)

    def integers(self, shape: Shape, bound: int, dtype: torch.dtype = torch.int64) -> Tensor:
        values = torch.randint(0, max(bound, 1), shape, dtype=dtype)
        if values.numel() and self.chance(0.3):
            values.view(-1)[self.random.randrange(values.numel())] = self.one(0, bound - 1)
        return self.place(values, lambda: self.out_of_range(bound, dtype))

    def out_of_range(self, bound: int, dtype: torch.dtype) -> int:
        limits = torch.iinfo(dtype)
        return self.one(bound, -1, limits.min, limits.max)

    def place(self, values: Tensor, poison: Callable[[], Any], *, buffer: bool = False) -> Tensor:
        """`values` (those of one row or column, where it is expanded) in a random memory layout.

        A `buffer` is one that every op can write: unit stride in the last dimension, rows apart.
        """
        shape, dims = values.shape, values.dim()
        layouts = ["exact", "slice", "slice"]
        if dims and not buffer:
            layouts += ["steps", "transposed", "expanded"]
            if values.dtype in (torch.float32, torch.float64):
                layouts.append("negated")
        layout = self.one(*layouts)
        if layout == "negated":  # torch's lazy negation, which it resolves before a kernel sees it
            return torch._neg_view(-values)
        if layout == "expanded":
            dim = self.random.randrange(dims)
            return values.narrow(dim, 0, min(1, shape[dim])).clone().expand(shape)
        if layout == "exact":
            view = values.clone(memory_format=torch.contiguous_format)
        elif layout == "transposed":
            whole = torch.full([n + self.one(0, 0, 3) for n in reversed(shape)], poison(), dtype=values.dtype)
            view = whole.permute(*reversed(range(dims)))
        else:
            steps = [self.one(1, 2, 3) if layout == "steps" else 1 for _ in shape]
            before = [self.one(0, 1, 3) for _ in shape]
            sizes = [b + n * s + self.one(0, 2) for b, n, s in zip(before, shape, steps, strict=True)]
            view = torch.full(sizes, poison(), dtype=values.dtype)
            view = view[tuple(slice(b, None, s) for b, s in zip(before, steps, strict=True))]
        view = view[tuple(slice(n) for n in shape)]
        view.copy_(values)
        if 1 in shape and self.chance(0.3):  # the stride of a single element means nothing
            odd = self.one(0, 7, 10**6)
            strides = [odd if n == 1 else s for n, s in zip(shape, view.stride(), strict=True)]
            view = view.as_strided(shape, strides, view.storage_offset())
        return view

    # Bad arguments

    def dtype(self, name: str, choices: list[torch.dtype]) -> Bad:
        dtype = self.one(*choices)
        return Bad(f"{name} in {dtype}", lambda a: a.update({name: a[name].to(dtype)}), (TypeError,))

    def rank(self, name: str) -> Bad:
        change = self.one(lambda t: t[None], lambda t: t[..., None], lambda t: t.new_zeros(()))
        return Bad(f"{name} of another rank", lambda a: a.update({name: change(a[name])}), (ValueError,))

    def length(self, name: str, dim: int) -> Bad:
        by = self.one(-1, 1, 17)

        def change(a: Arguments) -> None:
            shape = list(a[name].shape)
            shape[dim] = abs(shape[dim] + by)
            a[name] = a[name].new_zeros(shape)

        return Bad(f"{name} longer or shorter in dimension {dim}", change, (ValueError,))

    def device(self, name: str) -> Bad:
        def change(a: Arguments) -> None:
            a[name] = a[name].to("meta")

        return Bad(f"{name} on another device", change, (ValueError,))

    def sparse(self, name: str) -> Bad:
        # TypeError from the public functions, the dispatcher's own error from the raw ops
        errors = (TypeError, NotImplementedError)
        return Bad(f"{name} sparse", lambda a: a.update({name: a[name].to_sparse()}), errors)

    def value(self, name: str, bound: int, *errors: type[Exception]) -> Bad:
        def change(a: Arguments) -> None:
            a[name] = a[name].clone(memory_format=torch.contiguous_format)
            a[name].view(-1)[self.random.randrange(a[name].numel())] = self.out_of_range(bound, a[name].dtype)

        return Bad(f"{name} out of range", change, errors)

    def scalar(self, name: str, value: Any, *errors: type[Exception]) -> Bad:
        return Bad(f"{name} = {value!r}", lambda a: a.update({name: value}), errors)

    def buffers(self, call: Call) -> list[Bad]:
        """What no written argument may be."""
        found = []
        for name in call.written:
            buffer = call.arguments[name]
            found.append(
                Bad(f"{name} requires grad", lambda a, n=name: a[n].requires_grad_(), (RuntimeError,)),
            )
            if buffer.numel() and buffer.shape[0] > 1:
                shape = buffer.shape
                # Rows that are one and the same, or that start inside one another.
                strides = (
                    [(0, 1), *([(1, 1), (shape[-1] - 1, 1)] if shape[-1] > 1 else [])] if len(shape) > 1 else [(0,)]
                )
                storage = buffer.new_ones(shape).view(-1)
                view = storage.as_strided(shape, self.one(*strides))
                found.append(Bad(f"{name} overlaps itself", lambda a, n=name, v=view: a.update({n: v}), (ValueError,)))
                stepped = buffer.new_ones((*shape[:-1], 2 * shape[-1]))[..., ::2]
                if shape[-1] > 1:
                    found.append(
                        Bad(f"{name} in steps", lambda a, n=name, v=stepped: a.update({n: v}), (ValueError,)),
                    )
        return found

    def common(self, call: Call, dtypes: dict[str, list[torch.dtype]]) -> list[Bad]:
        """Bad arguments of every op: a tensor of another dtype, rank, device or layout."""
        tensors = call.tensors()
        found = [self.dtype(name, dtypes[name]) for name in tensors]
        found += [self.rank(name) for name in tensors]
        found += [self.device(name) for name in tensors if len(tensors) > 1]
        found += [self.sparse(name) for name in tensors]
        return found + self.buffers(call)


def other(dtype: torch.dtype) -> list[torch.dtype]:
    return [d for d in [*FLOATS, *NOT_FLOATS] if d != dtype]


def eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def largest(*tensors: Tensor | None) -> float:
    return max((float(t.abs().max()) for t in tensors if t is not None and t.numel()), default=0.0)


# ------------------------------------------------------------------------------------------------ the ops


def prefix_mask(draw: Draw) -> Call:
    shape = draw.size(), draw.size()
    values = torch.tensor(draw.random.choices([0, 1, 2, 7, -1, -100, -200, *EXTREMES], k=shape[0] * shape[1]))
    labels = draw.place(values.to(torch.int64).view(shape), lambda: 1)
    call = Call(
        "prefix_mask",
        lambda a: [ops.prefix_mask(**a)],
        lambda a: [eager.prefix_mask(**a)],
        {
            "labels": labels,
            "n": draw.one(-1, 0, 1, 2, 3, 1000, 2**63 - 1),
            "eos_token_id": draw.one(None, 2, *EXTREMES),
        },
    )
    call.bad = draw.common(call, {"labels": [torch.int32, *NOT_INDICES]})
    call.bad += [
        draw.scalar("n", draw.one(-2, -(2**63)), ValueError),
        draw.scalar("n", draw.one(1.5, None, 2**63), TypeError),
    ]
    call.bad += [draw.scalar("eos_token_id", draw.one(1.5, "2", -(2**64)), TypeError)]
    return call


def bad_index(draw: Draw, index: Tensor, vocab: int) -> list[Bad]:
    if not index.numel():
        return []
    none = Bad("K = 0", lambda a: a.update(index=a["index"][:, :0]), (ValueError,))
    return [draw.value("index", vocab, IndexError), *([none] if vocab else [])]


def bad_target(draw: Draw) -> list[Bad]:
    unknown = draw.one("mean", "constant", "", "GLOBAL_MEAN", None, [1.0], 1j, math.nan, True)
    return [draw.scalar("target", unknown, ValueError)]


def loss_and_gradients(
    function: Callable[..., Tensor], a: Arguments, wanted: list[str], create_graph: bool = False
) -> list[Tensor]:
    leaves = {name: a[name].detach().requires_grad_(a[name].is_floating_point()) for name in wanted}
    loss = function(
        **{name: leaves.get(name, value) for name, value in a.items() if name not in ("grad", "create_graph")}
    )
    if not wanted:
        return [loss]
    gradients = torch.autograd.grad(loss, list(leaves.values()), a["grad"], create_graph=create_graph)
    if create_graph:
        torch.autograd.grad(sum(gradient.sum() for gradient in gradients), list(leaves.values()))  # type: ignore[arg-type]
    return [loss.detach(), *gradients]


def in_double(a: Arguments) -> Arguments:
    return {n: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in a.items()}


def topk_mse(draw: Draw) -> Call:
    rows, vocab, k = draw.rows_and_vocabulary()
    dtype, target = draw.floating(), draw.one(*TARGETS)
    wanted = ["logits"] if draw.chance(0.8) else []
    arguments: Arguments = {
        "logits": draw.normal((rows, vocab), dtype),
        "index": draw.integers((rows, k), vocab, draw.one(torch.int32, torch.int64)),
        "target": target,
    }
    if wanted:
        arguments["grad"] = draw.normal((rows,), acc_dtype(dtype))
    scale = 1 + 2 * largest(arguments["logits"]) + (0 if isinstance(target, str) else abs(target))
    call = Call(
        "topk_mse",
        lambda a: loss_and_gradients(ops.topk_mse, a, wanted, "create_graph" in a),
        lambda a: loss_and_gradients(eager.topk_mse, in_double(a), wanted),
        arguments,
        error=256 * eps(acc_dtype(dtype)) * scale**2 * (1 + largest(arguments.get("grad"))),
    )
    grad = arguments.pop("grad", None)  # autograd's own checks cover it
    call.bad = draw.common(call, {"logits": NOT_FLOATS, "index": NOT_INDICES})
    if grad is not None:
        arguments["grad"] = grad
        call.bad.append(Bad("create_graph", lambda a: a.update(create_graph=True), (RuntimeError,)))
    call.bad += [draw.length("logits", 0), draw.length("index", 0)]
    call.bad += bad_index(draw, arguments["index"], vocab) + bad_target(draw)
    if rows:
        call.bad.append(Bad("V = 0", lambda a: a.update(logits=a["logits"][:, :0]), (ValueError,)))
    return call


def linear_arguments(draw: Draw) -> tuple[Arguments, tuple[int, int, int, int], torch.dtype]:
    rows, vocab, k = draw.rows_and_vocabulary()
    d, dtype = draw.size(), draw.floating()
    arguments = {
        "hidden": draw.normal((rows, d), dtype),
        "weight": draw.normal((vocab, d), dtype),
        "index": draw.integers((rows, k), vocab, draw.one(torch.int32, torch.int64)),
    }
    return arguments, (rows, vocab, k, d), dtype


def bad_linear(draw: Draw, a: Arguments, vocab: int) -> list[Bad]:
    found = [draw.length("hidden", 0), draw.length("hidden", 1), draw.length("weight", 1), draw.length("index", 0)]
    if a["weight_mean"] is not None:
        found.append(draw.length("weight_mean", 0))
    return found + bad_index(draw, a["index"], vocab)


def linear_topk_mse(draw: Draw) -> Call:
    arguments, (rows, vocab, k, _), dtype = linear_arguments(draw)
    hidden, weight, acc = arguments["hidden"], arguments["weight"], acc_dtype(dtype)
    target = draw.one(*TARGETS)
    bias = draw.normal((vocab,), dtype) if draw.chance(0.5) else None
    mean = draw.place(weight.double().mean(0).to(acc), lambda: math.nan) if draw.chance(0.3) else None
    if mean is not None and 0 in mean.stride() and mean.numel() > 1:
        mean = ops.weight_mean(weight)  # expanded, it would be another
    wanted = [
        name for name in ("hidden", "weight", "bias") if draw.chance(0.6) and (name != "bias" or bias is not None)
    ]
    arguments |= {"target": target, "bias": bias, "weight_mean": mean}
    bound = largest(hidden.double().abs() @ weight.double().abs().t()) + largest(bias)
    scale = 1 + 2 * bound + (0 if isinstance(target, str) else abs(target))
    grad = draw.normal((hidden.shape[0],), acc)
    through = (1 + largest(hidden)) * (1 + largest(weight)) * (1 + rows)
    # The dense product rounds the logits, and their gradient, to their dtype; with a bias torch may round twice.
    dense = not use_gather("auto", rows, k, vocab, "cpu")
    rounding = 256 * eps(acc) + (4 * eps(dtype) if dense else 0)
    call = Call(
        "linear_topk_mse",
        lambda a: loss_and_gradients(ops.linear_topk_mse, a, wanted, "create_graph" in a),
        lambda a: loss_and_gradients(eager.linear_topk_mse, in_double(a), wanted),
        arguments,
        error=rounding * (scale**2 + scale * (1 + largest(grad)) * through),
    )
    call.bad = draw.common(
        call,
        {
            "hidden": NOT_FLOATS,
            "weight": other(dtype),
            "index": NOT_INDICES,
            "bias": other(dtype),
            "weight_mean": other(acc),
        },
    )
    call.bad += bad_linear(draw, arguments, vocab) + bad_target(draw)
    if bias is not None:
        call.bad.append(draw.length("bias", 0))
    if wanted:
        arguments["grad"] = grad
        call.bad.append(Bad("create_graph", lambda a: a.update(create_graph=True), (RuntimeError,)))
    return call


def logit_gradient(a: Arguments, vocab: int) -> Tensor:
    """[R, V] in float64, from the backward ops' arguments."""
    index, residual = a["index"].long(), a["residual"].double()
    g = 2 / max(index.shape[1], 1) * a["grad"].double()[:, None] * residual
    gradient = torch.zeros(index.shape[0], vocab, dtype=torch.float64).scatter_add_(1, index, g)
    return gradient - g.sum(1, keepdim=True) / vocab if a["through_mean"] and vocab else gradient


def bad_incoming(draw: Draw, a: Arguments) -> list[Bad]:
    return [draw.length("grad", 0), draw.length("residual", 0), draw.length("residual", 1)]


def topk_mse_backward(draw: Draw) -> Call:
    rows, vocab, k = draw.rows_and_vocabulary()
    dtype = draw.floating()
    acc = acc_dtype(dtype)
    arguments: Arguments = {
        "grad": draw.normal((rows,), acc),
        "residual": draw.normal((rows, k), acc),
        "index": draw.integers((rows, k), vocab, draw.one(torch.int32, torch.int64)),
        "through_mean": draw.chance(0.5),
        "grad_logits": draw.normal((rows, vocab), dtype, buffer=True),
    }
    call = Call(
        "topk_mse_backward",
        lambda a: [raw.topk_mse_backward(**a)][1:],
        lambda a: [logit_gradient(a, a["grad_logits"].shape[1])],
        arguments,
        written=["grad_logits"],
        error=256 * eps(acc) * (1 + largest(arguments["grad"]) * largest(arguments["residual"])),
    )
    call.bad = draw.common(
        call, {"grad": other(acc), "residual": other(acc), "index": NOT_INDICES, "grad_logits": NOT_FLOATS}
    )
    call.bad += bad_incoming(draw, arguments) + bad_index(draw, arguments["index"], vocab)
    call.bad += [draw.length("index", 0), draw.length("grad_logits", 0)]
    return call


def linear_topk_mse_backward(draw: Draw) -> Call:
    arguments, (rows, vocab, k, d), dtype = linear_arguments(draw)
    acc, weight = acc_dtype(dtype), arguments["weight"]
    through_mean = draw.chance(0.5)
    shapes = {"grad_hidden": (rows, d), "grad_weight": (vocab, d), "grad_bias": (vocab,)}
    buffers = {n: draw.normal(s, dtype, buffer=True) if draw.chance(0.7) else None for n, s in shapes.items()}
    needed = through_mean and buffers["grad_hidden"] is not None
    mean = weight.double().mean(0).to(acc) if needed or draw.chance(0.3) else None
    arguments |= {
        "grad": draw.normal((rows,), acc),
        "residual": draw.normal((rows, k), acc),
        "weight_mean": mean,
        "through_mean": through_mean,
        **buffers,
    }

    def truth(a: Arguments) -> list[Tensor]:
        z = logit_gradient(a, vocab)
        gradients = {"grad_hidden": z @ a["weight"].double(), "grad_weight": z.t() @ a["hidden"].double()}
        gradients["grad_bias"] = z.sum(0)
        return [a[name].double() + gradients[name] for name in call.written]

    incoming = 2 * largest(arguments["grad"]) * largest(arguments["residual"])
    scale = (1 + largest(arguments["hidden"], weight)) * (1 + rows)
    call = Call(
        "linear_topk_mse_backward",
        lambda a: [raw.linear_topk_mse_backward(**a)][1:],
        truth,
        arguments,
        written=[name for name, buffer in buffers.items() if buffer is not None],
        error=256 * eps(acc) * (1 + incoming) * scale,
    )
    dtypes = {name: other(dtype) for name in ("weight", *shapes)}
    dtypes |= {"hidden": NOT_FLOATS, "index": NOT_INDICES}
    dtypes |= {name: other(acc) for name in ("grad", "residual", "weight_mean")}
    call.bad = draw.common(call, dtypes) + bad_incoming(draw, arguments) + bad_linear(draw, arguments, vocab)
    call.bad += [draw.length(name, dim) for name in call.written for dim in range(len(shapes[name]))]
    if needed:
        call.bad.append(draw.scalar("weight_mean", None, ValueError))
    return call


def rowwise(draw: Draw) -> tuple[Tensor, Tensor, torch.dtype]:
    rows, vocab, _ = draw.rows_and_vocabulary()
    dtype = draw.floating()
    return draw.normal((rows, vocab), dtype, buffer=True), draw.normal((rows,), acc_dtype(dtype)), dtype


def no_vocabulary(logits: Tensor, **others: Any) -> list[Bad]:
    def change(a: Arguments) -> None:
        for name in ("logits", "ref_logits"):
            if name in a:
                a[name] = a[name][:, :0]

    return [Bad("V = 0", change, (ValueError,))] if logits.shape[0] else []


def cross_entropy_(draw: Draw) -> Call:
    logits, row_weight, dtype = rowwise(draw)
    rows, vocab = logits.shape
    labels = draw.integers((rows,), vocab)

    def truth(a: Arguments) -> list[Tensor]:
        z = a["logits"].double()
        if not z.shape[0]:
            return [z.new_empty(0), z]
        one_hot = F.one_hot(a["labels"], vocab)
        loss = F.cross_entropy(z, a["labels"], reduction="none")
        return [loss, (z.softmax(1) - one_hot) * a["row_weight"].double()[:, None]]

    call = Call(
        "cross_entropy_",
        lambda a: [ops.cross_entropy_(**a)],
        truth,
        {"logits": logits, "labels": labels, "row_weight": row_weight},
        written=["logits"],
        error=256 * eps(acc_dtype(dtype)) * (1 + largest(logits)) * (1 + largest(row_weight)),
    )
    call.bad = draw.common(
        call,
        {"logits": NOT_FLOATS, "labels": [torch.int32, *NOT_INDICES], "row_weight": other(row_weight.dtype)},
    )
    call.bad += [draw.length(name, 0) for name in ("logits", "labels", "row_weight")] + no_vocabulary(logits)
    if rows:
        call.bad.append(draw.value("labels", vocab, IndexError, RuntimeError))  # torch's own
    return call


def unlikelihood_(draw: Draw) -> Call:
    logits, row_weight, dtype = rowwise(draw)
    if logits.shape[1] < 2:
        return cross_entropy_(draw)
    rows, vocab = logits.shape
    labels, floor = draw.integers((rows,), vocab), draw.random.choice((0.0, 0.3))

    def truth(a: Arguments) -> list[Tensor]:
        z, label = a["logits"].double(), a["labels"][:, None]
        others = z.scatter(1, label, float("-inf"))
        margin = z.gather(1, label)[:, 0] - others.logsumexp(1)
        pushed = margin.sigmoid() > a["floor"]
        weight = (a["row_weight"].double() * margin.sigmoid() * pushed)[:, None]
        return [F.softplus(margin, threshold=1e9) * pushed, (-weight * others.softmax(1)).scatter(1, label, weight)]

    call = Call(
        "unlikelihood_",
        lambda a: [ops.unlikelihood_(**a)],
        truth,
        {"logits": logits, "labels": labels, "row_weight": row_weight, "floor": floor},
        written=["logits"],
        error=256 * eps(acc_dtype(dtype)) * (1 + largest(logits)) * (1 + largest(row_weight)),
    )
    call.bad = draw.common(
        call,
        {"logits": NOT_FLOATS, "labels": [torch.int32, *NOT_INDICES], "row_weight": other(row_weight.dtype)},
    )
    call.bad += [draw.length(name, 0) for name in ("logits", "labels", "row_weight")] + no_vocabulary(logits)
    if rows:
        call.bad.append(draw.value("labels", vocab, IndexError, RuntimeError))  # torch's own
    return call


def kl_div_(draw: Draw) -> Call:
    logits, row_weight, dtype = rowwise(draw)
    ref_logits = draw.normal(logits.shape, dtype)

    def truth(a: Arguments) -> list[Tensor]:
        log_p, log_q = a["logits"].double().log_softmax(1), a["ref_logits"].double().log_softmax(1)
        p, q = log_p.exp(), log_q.exp()
        if a["reverse"]:
            loss = (p * (log_p - log_q)).sum(1)
            gradient = p * (log_p - log_q - loss[:, None])
        else:
            loss, gradient = (q * (log_q - log_p)).sum(1), p - q
        return [loss, gradient * a["row_weight"].double()[:, None]]

    call = Call(
        "kl_div_",
        lambda a: [ops.kl_div_(**a)],
        truth,
        {"logits": logits, "ref_logits": ref_logits, "row_weight": row_weight, "reverse": draw.chance(0.5)},
        written=["logits"],
        error=256 * eps(acc_dtype(dtype)) * (1 + largest(logits, ref_logits)) * (1 + largest(row_weight)),
    )
    call.bad = draw.common(
        call, {"logits": NOT_FLOATS, "ref_logits": other(dtype), "row_weight": other(row_weight.dtype)}
    )
    call.bad += [draw.length(name, dim) for name in ("logits", "ref_logits") for dim in (0, 1)]
    call.bad += [draw.length("row_weight", 0), *no_vocabulary(logits)]
    return call


def scale_(draw: Draw) -> Call:
    shape = tuple(draw.size() for _ in range(draw.random.randint(1, 2)))
    dtype = draw.floating()
    tensor = draw.normal(shape, dtype, buffer=True).contiguous()
    factor = torch.tensor(draw.one(1.0, 0.0, -2.5), dtype=draw.one(torch.float32, torch.float64))

    def run(a: Arguments) -> list[Tensor]:
        fused.scale_(**a)
        return []

    call = Call(
        "scale_",
        run,
        lambda a: [a["tensor"].double() * a["factor"].double()],
        {"tensor": tensor, "factor": factor},
        written=["tensor"],
    )
    call.bad = [draw.dtype("tensor", NOT_FLOATS), draw.dtype("factor", [torch.bfloat16, *NOT_FLOATS])]
    call.bad += [Bad("factor of one dimension", lambda a: a.update(factor=a["factor"][None]), (ValueError,))]
    call.bad += [*map(draw.device, call.tensors()), draw.sparse("tensor"), *draw.buffers(call)]
    return call


OPS = [
    prefix_mask,
    topk_mse,
    topk_mse_backward,
    linear_topk_mse,
    linear_topk_mse_backward,
    cross_entropy_,
    unlikelihood_,
    kl_div_,
    scale_,
]


# ---------------------------------------------------------------------------------------------- the cases


def memory(t: Tensor) -> Tensor:
    """A copy of all bytes of the allocation that `t` lies in."""
    return torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage()).clone()


class Fuzzer:
    def __init__(self, seed: int, cases: int, record: str) -> None:
        self.seeds = range(seed, seed + cases)
        self.record = os.open(record, os.O_WRONLY)
        self.cases: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.case = ""

    def run(self) -> int:
        if _build.jit_name() not in ops.extension_path():
            raise RuntimeError(f"{ops.extension_path()} is not the build that was asked for")
        start, failed = time.monotonic(), 0
        for seed in self.seeds:
            try:
                self.one(seed)
            except Exception:
                failed += 1
                print(f"{self.case}\n{traceback.format_exc()}", file=sys.stderr)
                if failed == 10:
                    break
        os.ftruncate(self.record, 0)  # it did not die
        counts = ", ".join(f"{f.__name__} {self.cases[f.__name__]} ({self.refused[f.__name__]})" for f in OPS)
        print(
            f"{'FAILED: ' + str(failed) + ' of ' if failed else ''}{self.cases.total()} cases, "
            f"{self.refused.total()} bad arguments refused, in {time.monotonic() - start:.0f} s, "
            f"{'with' if _build.SANITIZED else 'without'} sanitizers: {counts}"
        )
        return int(failed > 0)

    def describe(self, seed: int, what: str) -> None:
        self.case = f"seed {seed} (again: --seed {seed} --cases 1): {what}"
        line = self.case.encode() + b"\n"
        os.pwrite(self.record, line, 0)
        os.ftruncate(self.record, len(line))

    def one(self, seed: int) -> None:
        self.describe(seed, "drawing the arguments")
        draw = Draw(seed)
        call = draw.one(*OPS)(draw)
        self.cases[call.op] += 1
        if draw.chance(0.4):
            bad = draw.one(*call.bad)
            bad.change(call.arguments)
            self.describe(seed, f"{call}, bad: {bad.what}")
            self.refuse(call, bad)
            self.refused[call.op] += 1
        else:
            self.describe(seed, str(call))
            self.accept(call)

    def refuse(self, call: Call, bad: Bad) -> None:
        before = {n: memory(t) for n, t in call.tensors().items() if t.layout == torch.strided and not t.is_meta}
        try:
            call.run(call.arguments)
        except bad.errors:
            pass
        else:
            raise AssertionError("accepted")
        for name, bytes_ in before.items():
            assert torch.equal(memory(call.arguments[name]), bytes_), f"{name} was changed all the same"

    def accept(self, call: Call) -> None:
        tensors = call.tensors()
        copies = {name: t.clone() for name, t in tensors.items()}
        before = {name: memory(t) for name, t in tensors.items()}
        finite = all(bool(t.isfinite().all()) for t in copies.values())
        truth = call.truth(call.arguments | copies)
        results = call.run(call.arguments)
        results += [call.arguments[name].clone() for name in call.written]
        for name in call.written:  # then everything else must be as it was
            tensors[name].copy_(copies[name])
        for name, bytes_ in before.items():
            assert torch.equal(memory(tensors[name]), bytes_), f"{name} was changed outside of what is written"
        for i, (result, exact) in enumerate(zip(results, truth, strict=True)):
            assert result.shape == exact.shape, f"result {i}: {result.shape} instead of {exact.shape}"
            if not result.is_floating_point():
                assert torch.equal(result, exact), f"result {i}"
                continue
            if not finite:
                continue
            allowed = call.error + 4 * eps(result.dtype) * exact.abs()
            error = (result.double() - exact).abs()
            assert (error <= allowed).all(), f"result {i}: off by {error.max()}, {call.error} allowed"


if __name__ == "__main__":
    sys.exit(main())
