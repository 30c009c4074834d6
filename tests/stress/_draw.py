"""Random arguments: sizes, values, memory layouts, and what makes a good argument a bad one."""

import math
import random
from collections.abc import Callable
from typing import Any

import torch
from _call import Arguments, Bad, Call
from torch import Tensor

Shape = tuple[int, ...]
FLOATS = [torch.float32, torch.float64, torch.bfloat16]
NOT_FLOATS = [torch.float16, torch.int32, torch.int64, torch.bool, torch.complex64]
NOT_INDICES = [torch.int16, torch.uint8, torch.bool, torch.float32, torch.float64]
TARGETS = ["global_mean", "global_mean_detached", "local_mean", 0.5, -3, 0.0]
EXTREMES = [-(2**63), 2**63 - 1]


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

    def normal(self, shape: Shape, dtype: torch.dtype, *, buffer: bool = False, whole: bool = False) -> Tensor:
        """With `whole`, small whole numbers: bfloat16 holds what most sums of their products come to."""
        values = torch.randn(shape).round().clamp(-2, 2) if whole else torch.randn(shape) * self.one(1, 1, 5)
        values = values.to(dtype)
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

    def place(self, values: Tensor, poison: Callable[[], Any], *, buffer: bool = False, expand: bool = True) -> Tensor:
        """`values` (those of one row or column, where it is expanded) in a random memory layout.

        A `buffer` is one that every op can write: unit stride in the last dimension, rows apart.
        """
        shape, dims = values.shape, values.dim()
        layouts = ["exact", "slice", "slice"]
        if dims and not buffer:
            layouts += ["steps", "transposed", *(["expanded"] if expand else [])]
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

    def value(self, name: str, bound: int, *errors: type[Exception], ignore: int | None = None) -> Bad:
        """Out of range, and not what is ignored."""

        def change(a: Arguments) -> None:
            wrong = ignore
            while wrong == ignore:
                wrong = self.out_of_range(bound, a[name].dtype)
            a[name] = a[name].clone(memory_format=torch.contiguous_format)
            last = a[name].numel() - 1  # a shift of labels leaves out the first
            a[name].view(-1)[last if a.get("shift") else self.random.randint(0, last)] = wrong

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
