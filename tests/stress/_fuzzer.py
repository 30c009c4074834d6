"""Makes the calls one after the other, each from a seed of its own, and checks what comes of them."""

import os
import sys
import time
import traceback
from collections import Counter

import _general_calls
import _kernel_calls
import torch
from _call import Bad, Call
from _draw import Draw, eps
from torch import Tensor

from palu import _build, ops

OPS = [*_kernel_calls.OPS, *_general_calls.OPS]


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
        read = call.read(call.arguments | copies)
        finite = all(bool(t.isfinite().all()) for t in read.values() if isinstance(t, Tensor))
        truth = call.truth(read)
        results = call.run(call.arguments)
        results += [call.arguments[name].clone() for name in call.written]
        for name in call.written:  # then everything else must be as it was
            tensors[name].copy_(copies[name])
        for name, bytes_ in before.items():
            assert torch.equal(memory(tensors[name]), bytes_), f"{name} was changed outside of what is written"
        errors = call.error if isinstance(call.error, list) else [call.error] * len(truth)
        for i, (result, exact, error) in enumerate(zip(results, truth, errors, strict=True)):
            assert result.shape == exact.shape, f"result {i}: {result.shape} instead of {exact.shape}"
            if not result.is_floating_point():
                assert torch.equal(result, exact), f"result {i}"
                continue
            if not finite:
                continue
            off = (result.double() - exact).abs()
            allowed = error + 4 * eps(result.dtype) * exact.abs()
            assert (off <= allowed).all(), f"result {i}: off by {off.max()}, {error} allowed"
