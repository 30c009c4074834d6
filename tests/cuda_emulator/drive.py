"""Run a project's CUDA kernels on the emulated machine and compare them with its plain-torch twins in float64.

    python tests/cuda_emulator/drive.py . [--cases 300] [--seed 0] [--only topk,kl] [--quick] [--folder BUILD]

Needs g++ (12 or later) and torch, no GPU and no CUDA. README.md says what is checked and what is not.
"""

import argparse
import ctypes
import importlib.util
import math
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import rewrite
import torch
from torch import Tensor

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]  # in the order of launch.h
CENTERS = {"global_mean": 0, "global_mean_detached": 0, "local_mean": 1}
GUARD = 4096  # bytes around every tensor
eager: Any = None  # the project's plain-torch twins


def acc(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---------------------------------------------------------------------------------------------------
# Tensors in guarded memory


class Placed:
    """A vector or a matrix that begins `lead` elements past a 16-byte boundary, its rows `stride` elements apart.

    Everything around it and between its rows is 0xFF: NaN as a float, -1 as an integer. `values` None: an output,
    filled with the same.
    """

    def __init__(
        self,
        name: str,
        values: Tensor | None,
        shape: tuple[int, ...] = (),
        dtype: Any = None,
        *,
        lead: int = 0,
        stride: int | None = None,
    ) -> None:
        shape = tuple(values.shape) if values is not None else shape
        dtype = values.dtype if values is not None else dtype
        self.name, self.element = name, dtype.itemsize
        self.rows, self.columns = (1, *shape)[-2:] if shape else (1, 1)
        self.stride = self.columns if stride is None else stride
        span = (self.rows - 1) * self.stride + self.columns if self.rows and self.columns else 0
        begin = GUARD + lead * self.element
        self.bytes = torch.full((begin + -(-span * self.element // 16) * 16 + GUARD,), 0xFF, dtype=torch.uint8)
        strides = (self.stride, 1)[2 - len(shape) :] if shape else ()
        flat = self.bytes[begin : begin + max(span, 1) * self.element].view(dtype)
        self.view = flat.as_strided(shape, strides)
        self.pointer = flat.data_ptr()
        if values is not None:
            self.view.copy_(values)
        self.initial = self.bytes.clone()
        self.initial_view = (
            self.initial[begin : begin + max(span, 1) * self.element].view(dtype).as_strided(shape, strides)
        )

    def place(self) -> str:
        """How many elements past a 16-byte boundary it begins, and its stride."""
        return f"+{self.pointer % 16 // self.element} stride {self.stride}"

    def reset(self) -> None:
        self.bytes.copy_(self.initial)

    def intact(self, written: bool) -> bool:
        """Whether nothing changed outside the elements (or, unless `written`, at all)."""
        expected = self.initial.clone()
        if written and self.view.numel():
            offset = self.pointer - self.bytes.data_ptr()
            there = expected[offset:][: (len(expected) - offset) // self.element * self.element].view(self.view.dtype)
            there.as_strided(self.view.shape, self.view.stride()).copy_(self.view)
        return torch.equal(expected, self.bytes)


@dataclass
class Phase:
    """One call of a launcher."""

    launcher: str
    arguments: dict[str, Any]  # the members of its struct: numbers, Placed, or None
    writes: list[str]
    fresh: list[str] = field(default_factory=list)  # of these, what must not be read before it is written


@dataclass
class Output:
    placed: Placed
    truth: Tensor  # in float64
    twin: Tensor | None  # of plain torch in the same dtypes
    scale: Tensor | None = None  # what an error is relative to, besides the row's largest value


@dataclass
class Case:
    op: str
    text: str
    buffers: list[Placed]
    phases: list[Phase]
    outputs: list[Output]
    asserts: bool = False  # a device assertion is what must happen


# ---------------------------------------------------------------------------------------------------
# The emulated machine


C_TYPES = {"bool": ctypes.c_bool, "int64_t": ctypes.c_int64, "double": ctypes.c_double}
C_TYPES |= {"Dtype": ctypes.c_int, "Center": ctypes.c_int}


def read_structs(csrc: Path) -> dict[str, type[ctypes.Structure]]:
    """The struct that each launcher in launch.h takes, by the launcher's name."""
    text = re.sub(r"//.*", "", (csrc / "prefix_mask.h").read_text() + (csrc / "cuda" / "launch.h").read_text())
    structs = {}
    for struct, body in re.findall(r"struct (\w+) \{(.*?)\};", text, re.DOTALL):
        fields = []
        for kind, names in re.findall(r"(?:const )?(\w+\*?) ([\w, ]+);", body):
            of = ctypes.c_void_p if kind.endswith("*") else C_TYPES[kind]
            fields += [(name, of) for name in names.split(", ")]
        structs[struct] = type(struct, (ctypes.Structure,), {"_fields_": fields})
    launchers = re.findall(r"void (\w+)\(const (\w+)& p, cudaStream_t stream\);", text)
    return {launcher: structs[struct] for launcher, struct in launchers}


class Machine:
    """One library: an architecture, fast or checked."""

    def __init__(self, path: Path, structs: dict[str, type[ctypes.Structure]]) -> None:
        self.path, self.structs = path, structs
        self.library = ctypes.CDLL(str(path))
        self.library.emu_report.restype = ctypes.c_char_p

    def begin(self, order: int = 0, seed: int = 0, preempt: int = 0, dry: bool = False) -> None:
        self.library.emu_begin(order, ctypes.c_uint64(seed), preempt, int(dry))

    def register(self, placed: Placed, writable: bool, initialised: bool) -> None:
        numbers = [placed.element, placed.rows, placed.columns, placed.stride]
        self.library.emu_buffer(
            placed.name.encode(),
            ctypes.c_void_p(placed.pointer),
            *[ctypes.c_int64(n) for n in numbers],
            int(writable),
            int(initialised),
        )

    def call(self, launcher: str, arguments: dict[str, Any]) -> None:
        struct = self.structs[launcher]
        members = [name for name, _ in struct._fields_]
        if sorted(members) != sorted(arguments):
            raise TypeError(f"{launcher} takes {', '.join(members)}; given: {', '.join(arguments)}")
        values = {name: value.pointer if isinstance(value, Placed) else value for name, value in arguments.items()}
        p = struct(**{name: value for name, value in values.items() if value is not None})
        function = getattr(self.library, f"palu_{launcher}")
        function.restype = ctypes.c_bool
        if not function(ctypes.byref(p), ctypes.c_int64(ctypes.sizeof(p))):
            raise TypeError(f"{struct.__name__} has another size in {self.path}")

    def report(self) -> list[list[str]]:
        return [line.split("\t") for line in self.library.emu_report().decode().splitlines()]

    def source_line(self, place: str) -> str:
        if place in ("0", "0x0"):
            return ""
        command = ["addr2line", "-s", "-e", str(self.path), place]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


# How a case is run on each architecture: kind, order (forward, reverse, random), preemption.
SCHEDULES = [("fast", 0, 0), ("fast", 1, 0), ("fast", 2, 0), ("checked", 0, 0), ("checked", 2, 7)]
QUICK = [("checked", 1, 0), ("checked", 2, 7)]


class Driver:
    def __init__(self, machines: dict[tuple[int, str], Machine], schedules: list[tuple[str, int, int]]) -> None:
        self.machines, self.schedules = machines, schedules
        self.architectures = sorted({architecture for architecture, _ in machines})
        self.cases, self.runs, self.seconds = Counter(), Counter(), Counter()
        self.findings: dict[tuple[str, ...], list[Any]] = defaultdict(lambda: [0, ""])
        self.worst: dict[tuple[str, ...], tuple[float, float, float, str]] = {}
        self.bytes: list[str] = []

    def found(self, case: Case, *key: str) -> None:
        entry = self.findings[(case.op, *key)]
        entry[0] += 1
        entry[1] = entry[1] or case.text

    def run(self, case: Case, show_bytes: bool = False) -> None:
        began = time.perf_counter()
        self.cases[case.op] += 1
        for architecture in self.architectures:
            first: dict[str, list[Tensor]] = {}  # by kind: the two are compiled differently, and round differently
            for number, (kind, order, preempt) in enumerate(self.schedules):
                machine = self.machines[architecture, kind]
                for placed in case.buffers:
                    placed.reset()
                asserted = False
                touched: list[list[str]] = []
                for phase in case.phases:
                    machine.begin(order, self.cases[case.op] * 31 + number, preempt)
                    for placed in case.buffers:
                        machine.register(placed, placed.name in phase.writes, placed.name not in phase.fresh)
                    machine.call(phase.launcher, phase.arguments)
                    for kind_of_line, *rest in machine.report():
                        if kind_of_line == "violation":
                            if case.asserts and rest[0] == "assertion":
                                asserted = True
                            else:
                                self.found(
                                    case, rest[0], machine.source_line(rest[2]), rest[3] if rest[0] != "race" else ""
                                )
                        elif kind_of_line == "buffer":
                            touched.append([phase.launcher, *rest])
                self.runs[case.op] += 1
                if case.asserts:
                    if not asserted:
                        self.found(case, "no assertion", str(architecture))
                    continue
                written = {name for phase in case.phases for name in phase.writes}
                for placed in case.buffers:
                    if not placed.intact(placed.name in written):
                        self.found(case, "guard zone", placed.name)
                results = [output.placed.view.clone() for output in case.outputs]
                if kind not in first:
                    first[kind] = results
                    self.compare(case, architecture)
                for output, a, b in zip(case.outputs, first[kind], results, strict=True):
                    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.dtype.itemsize]
                    if not torch.equal(a.view(bits), b.view(bits)):
                        self.found(case, f"{output.placed.name} depends on the schedule", str(architecture))
                if show_bytes and kind == "checked":
                    self.note_bytes(case, architecture, touched)
        self.seconds[case.op] += time.perf_counter() - began

    def compare(self, case: Case, architecture: int) -> None:
        for output in case.outputs:
            name, got, truth = output.placed.name, output.placed.view, output.truth
            if got.dtype in (torch.bool, torch.int64):
                if not torch.equal(got, truth):
                    self.found(case, f"{name} is wrong", str(architecture))
                continue
            mine, units = errors(output, got)
            plain, plain_units = errors(output, output.twin)
            key = case.op, name, short(got.dtype)
            if key not in self.worst or units > self.worst[key][0]:
                self.worst[key] = units, mine, plain, case.text
            if not units <= max(16, 4 * plain_units):
                self.found(case, f"{name} is wrong", short(got.dtype), f"arch {architecture}")

    def note_bytes(self, case: Case, architecture: int, touched: list[list[str]]) -> None:
        sizes = {placed.name: placed.element for placed in case.buffers}
        for launcher in dict.fromkeys(line[0] for line in touched):
            lines = [line for line in touched if line[0] == launcher and (int(line[2]) or int(line[3]))]
            asked = sum(int(line[2]) + int(line[3]) for line in lines)
            least = sum((int(line[4]) + int(line[5])) * sizes[line[1]] for line in lines)
            self.bytes.append(
                f"\n{launcher}, {architecture}, {case.text}\n"
                f"  {asked / 1e6:.3f} MB asked for, {least / 1e6:.3f} MB touched"
            )
            for _, name, *numbers in lines:
                read, written, cells_read, cells_written, accesses = map(int, numbers)
                self.bytes.append(
                    f"  {name:12} read {read / 1e6:7.3f} of {cells_read * sizes[name] / 1e6:7.3f} MB, "
                    f"written {written / 1e6:7.3f} of {cells_written * sizes[name] / 1e6:7.3f} MB, "
                    f"{(read + written) / accesses:4.1f} bytes an access"
                )

    def summary(self) -> int:
        print(f"\n{'op':24}{'cases':>7}{'runs':>7}{'s':>7}")
        for op in self.cases:
            print(f"{op:24}{self.cases[op]:7}{self.runs[op]:7}{self.seconds[op]:7.0f}")
        print("\nWorst error in units of what cannot be helped; relative to the row's largest value; plain torch's:")
        for (op, name, dtype), (units, mine, plain, text) in sorted(self.worst.items()):
            print(f"{op:17}{name:12}{dtype:9} {units:5.1f} units {mine:8.1e} plain {plain:8.1e}  {text}")
        for line in self.bytes:
            print(line)
        for key, (count, text) in self.findings.items():
            print(f"FOUND {count}x {' | '.join(filter(None, key))}\n      first in {text}")
        good = sum(self.cases.values())
        print(
            f"\n{good} cases, {sum(self.runs.values())} runs, {len(self.findings)} findings, "
            f"{sum(self.seconds.values()):.0f} s"
        )
        return 1 if self.findings else 0


def errors(output: Output, got: Tensor | None) -> tuple[float, float]:
    """The largest error: relative to its row's largest value, and in units of what cannot be helped.

    A unit is half an ulp of the result in its own dtype, and one of the row's scale in the dtype of its sums.
    Infinite where what must be infinite or NaN is not, or the other way round.
    """
    truth = output.truth
    if got is None or not truth.numel():
        return 0.0, 0.0
    rounded = truth.to(got.dtype)  # what overflows, overflows
    special = ~rounded.isfinite()
    code = {"nan": 0.5, "posinf": 1, "neginf": -1}
    if not torch.equal(got[special].double().nan_to_num(**code), rounded[special].double().nan_to_num(**code)):
        return math.inf, math.inf
    truth, got = torch.where(special, 0, truth), torch.where(special, 0, got)
    size, info = truth.abs(), torch.finfo(got.dtype)
    scale = size.amax(-1, keepdim=True) if truth.dim() == 2 else size
    if output.scale is not None:
        scale = torch.maximum(scale, output.scale.nan_to_num(nan=0.0, posinf=0.0).reshape(scale.shape))
    error = (got.double() - truth).abs()
    unit = size * info.eps / 2 + scale * torch.finfo(acc(got.dtype)).eps + info.tiny * info.eps / 2
    if error.isnan().any():
        return math.inf, math.inf
    return tuple(float(torch.where(error == 0, 0.0, error / of).max()) for of in (scale, unit))


# ---------------------------------------------------------------------------------------------------
# Cases


class Draw:
    """Random sizes, layouts and values."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        torch.manual_seed(seed)

    def one(self, *choices: Any) -> Any:
        return self.random.choice(choices)

    def chance(self, p: float) -> bool:
        return self.random.random() < p

    def vocabulary(self) -> int:
        kind = self.random.random()
        if kind < 0.35:
            return self.random.randint(1, 40)
        if kind < 0.65:
            return self.one(64, 255, 256, 257, 1000, 2047, 2048, 4095, 4096, 4097, 5003)
        if kind < 0.9:  # around tiles and clusters
            return self.one(8192, 16384, 32768, 65536) + self.random.randint(-9, 9)
        return self.one(49152, 50257, 128256, 151936, 200_000, 200_003)

    def rows(self, vocabulary: int) -> int:
        if self.chance(0.04):
            return 0
        return self.one(1, 1, 2, 3) if vocabulary > 3000 else self.random.randint(1, 12)

    def layout(self, columns: int) -> dict[str, int]:
        """Where rows begin: at 16 bytes, anywhere, or apart."""
        return {"lead": self.one(0, 0, 1, 3, 5, 7), "stride": columns + self.one(0, 0, 0, 1, 3, 8, 16)}

    def logits(self, rows: int, vocabulary: int, dtype: torch.dtype) -> tuple[Tensor, str]:
        kind = self.one("normal", "normal", "wide", "extreme", "equal", "one high")
        z = torch.randn(rows, vocabulary, dtype=torch.float64)
        if kind == "wide":
            z *= 30
        elif kind == "extreme":
            z = z.sign() * 1e4 + z
        elif kind == "equal":
            z = z[:, :1].expand_as(z).clone() * 3
        elif kind == "one high" and rows:
            z[:, self.random.randrange(vocabulary)] = 60.0
        return z.to(dtype), kind

    def index(self, rows: int, vocabulary: int, k: int, dtype: torch.dtype, kind: str = "") -> tuple[Tensor, str]:
        kind = kind or self.one("any", "unique", "unique", "one value")
        if kind == "unique" and k <= vocabulary:
            if vocabulary > 4000:  # a step that has no factor in common with the vocabulary
                step = next(s for s in range(vocabulary // 3 + 1, vocabulary) if math.gcd(s, vocabulary) == 1)
                at = (torch.randint(0, vocabulary, (rows, 1)) + torch.arange(k) * step) % vocabulary
            else:
                at = torch.stack([torch.randperm(vocabulary)[:k] for _ in range(rows)]) if rows else torch.zeros(0, k)
        elif kind == "one value":
            at = torch.randint(0, vocabulary, (rows, 1)).expand(rows, k)
        else:
            kind, at = "any", torch.randint(0, vocabulary, (rows, k))
        at = at.clone()
        if rows and k > 1 and kind == "any":
            at[0, 0], at[-1, -1] = 0, vocabulary - 1
        return at.to(dtype), kind

    def k(self, vocabulary: int) -> int:
        kind = self.random.random()
        if kind < 0.15:
            return 1
        if kind < 0.7:
            return self.random.randint(1, min(vocabulary, 70))
        if kind < 0.9 or vocabulary < 1000:
            return self.random.randint(1, min(vocabulary, 1500))
        return self.one(1000, 5000, 5119, 5120, 5121, 6000, 10_241)

    def target(self) -> str | float:
        return self.one("global_mean", "global_mean", "global_mean_detached", "local_mean", 0.5, -3.0, 0.0)


def center(target: str | float) -> tuple[int, float]:
    return (CENTERS[target], 0.0) if isinstance(target, str) else (2, float(target))


def prefix_mask(draw: Draw, batch: int | None = None, length: int | None = None, n: int | None = None) -> Case:
    batch = draw.one(0, 1, 2, 3, 4, 5, 17) if batch is None else batch
    length = draw.one(0, 1, 5, 31, 32, 33, 63, 255, 256, 257, 511, 600, 1025) if length is None else length
    n = draw.one(-1, 0, 1, 3, 31, 32, 33, 256, 300, 2**62, 2**63 - 1) if n is None else n
    eos = draw.one(None, None, 2, 0, 2**63 - 1)
    labels = torch.randint(0, 5, (batch, length))
    gaps = draw.one(0.0, 0.005, 0.1, 0.5, 1.0)  # long spans, short ones, none
    labels[torch.rand(batch, length) < gaps] = draw.one(-1, -100, -200, -(2**63))
    if labels.numel() and draw.chance(0.3):
        labels.view(-1)[draw.random.randrange(labels.numel())] = 2**63 - 1
    layout = draw.one("rows", "rows", "transposed", "steps", "expanded")
    if layout == "expanded":
        labels = labels[:1].expand(batch, length)
        placed = Placed("labels", labels[:1].clone() if batch else labels.clone())
        strides = 0, 1
    elif layout == "transposed":
        placed = Placed("labels", labels.t().clone(), stride=batch + draw.one(0, 3))
        strides = 1, placed.stride
    elif layout == "steps":
        step = draw.one(2, 3)
        spread = torch.full((batch, length * step), 1)
        spread[:, ::step] = labels
        placed = Placed("labels", spread, stride=length * step + draw.one(0, 5))
        strides = placed.stride, step
    else:
        placed = Placed("labels", labels, stride=length + draw.one(0, 1, 5))
        strides = placed.stride, 1
    mask = Placed("mask", None, (batch, length), torch.bool)
    truth = eager.prefix_mask(labels, min(n, 2**40), eos)
    call = {"labels": placed, "batch_stride": strides[0], "token_stride": strides[1], "mask": mask}
    call |= {"batch": batch, "length": length, "n": n, "eos": -1 if eos is None else eos}
    text = f"[{batch}, {length}] {layout}, n {n}, eos {eos}, gaps {gaps}"
    return Case(
        "prefix_mask",
        text,
        [placed, mask],
        [Phase("prefix_mask", call, ["mask"], ["mask"])],
        [Output(mask, truth, None)],
    )


def topk_mse(
    draw: Draw,
    rows: int | None = None,
    vocabulary: int | None = None,
    k: int | None = None,
    dtype: torch.dtype | None = None,
    target: Any = None,
    plain: bool = False,
) -> Case:
    vocabulary = vocabulary or draw.vocabulary()
    rows = draw.rows(vocabulary) if rows is None else rows
    k = k or draw.k(vocabulary)
    dtype = dtype or draw.one(*DTYPES)
    target = draw.target() if target is None else target
    z, kind = (torch.randn(rows, vocabulary).to(dtype), "normal") if plain else draw.logits(rows, vocabulary, dtype)
    at, kind_of_index = draw.index(rows, vocabulary, k, draw.one(torch.int32, torch.int64), "unique" if plain else "")
    incoming = torch.randn(rows, dtype=acc(dtype)) * draw.one(1, 1e-3)
    if rows and draw.chance(0.3):
        incoming[draw.random.randrange(rows)] = 0
    logits = Placed("logits", z, **({} if plain else draw.layout(vocabulary)))
    gradient = Placed("grad_logits", None, (rows, vocabulary), dtype, **({} if plain else draw.layout(vocabulary)))
    index, grad = Placed("index", at), Placed("grad", incoming)
    loss, residual = Placed("loss", None, (rows,), acc(dtype)), Placed("residual", None, (rows, k), acc(dtype))
    code, through = DTYPES.index(dtype), target == "global_mean"
    where, constant = center(target)
    int64 = at.dtype == torch.int64
    both = {"dtype": code, "index64": int64, "index": index, "residual": residual}
    both |= {"rows": rows, "vocab_size": vocabulary, "k": k}
    forward = both | {"logits": logits, "logits_stride": logits.stride, "loss": loss}
    forward |= {"center": where, "constant": constant}
    backward = both | {"grad": grad, "grad_logits": gradient, "grad_logits_stride": gradient.stride}
    backward |= {"through_mean": through}
    phases = [
        Phase("topk_mse", forward, ["loss", "residual"], ["loss", "residual", "grad_logits"]),
        Phase("topk_mse_backward", backward, ["grad_logits"], ["grad_logits"]),
    ]

    def twin(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        leaf = values.clone().requires_grad_()
        total = eager.topk_mse(leaf, at, target)
        total.backward(incoming.to(total.dtype))
        kept = values.gather(1, at.long()).to(total.dtype)
        c = {0: values.mean(1, keepdim=True, dtype=total.dtype), 1: kept.mean(1, keepdim=True)}.get(where, constant)
        return total.detach(), kept - c, leaf.grad

    true, same = twin(z.double()), twin(z)
    # Beside rounding: a thread's sum for the mean is one of V/1024 terms, an entry that occurs often sums as many.
    eps = torch.finfo(acc(dtype)).eps
    size = torch.full((rows,), abs(constant), dtype=torch.float64)
    if rows:
        size = torch.maximum(size, z.double().abs().amax(1)) * (1 + vocabulary / 4096)
    off = true[1].abs().amax(1) if rows else size
    times = torch.zeros(rows, vocabulary).scatter_add_(1, at.long(), torch.ones(rows, k)).amax() if rows else 1
    scales = [true[0] + size * off + eps * size**2, size, incoming.double().abs() * size * 2 / k * (2 + times)]
    outputs = [Output(p, *both) for p, *both in zip((loss, residual, gradient), true, same, scales, strict=True)]
    text = (
        f"{short(dtype)} [{rows}, {vocabulary}] K {k} {target}, logits {kind} {logits.place()}, "
        f"gradient {gradient.place()}, index {short(at.dtype)} {kind_of_index}"
    )
    return Case("topk_mse", text, [logits, gradient, index, grad, loss, residual], phases, outputs)


def linear(
    draw: Draw,
    rows: int | None = None,
    vocabulary: int | None = None,
    size: int | None = None,
    k: int | None = None,
    dtype: torch.dtype | None = None,
    target: Any = None,
    plain: bool = False,
) -> Case:
    size = draw.one(0, 1, 7, 8, 16, 64, 65, 256, 576, 2047, 2048, 4096) if size is None else size
    vocabulary = vocabulary or (draw.random.randint(1, 60) if size > 600 else draw.one(1, 5, 31, 257, 1000, 4099))
    k = k or draw.one(1, 2, 7, 31, 32, 33, 40, 65, 100, 300)
    if rows is None:  # many: a block sums more than one chunk of the K terms of its row
        rows = 520 if 0 < size <= 64 and 33 <= k <= 100 else draw.one(0, 1, 1, 2, 3, 5, 9)
    dtype = dtype or draw.one(*DTYPES)
    target = draw.target() if target is None else target
    h = (torch.randn(rows, size) * draw.one(1, 1, 5)).to(dtype)
    w = (torch.randn(vocabulary, size) * draw.one(0.02, 1) + draw.one(0, 0, 0.1)).to(dtype)
    b = torch.randn(vocabulary).to(dtype) if draw.chance(0.5) else None
    at, kind = draw.index(rows, vocabulary, k, draw.one(torch.int32, torch.int64), "unique" if plain else "")
    incoming = torch.randn(rows, dtype=acc(dtype))
    through = target == "global_mean"
    wanted = [draw.chance(0.8), draw.chance(0.8), b is not None and draw.chance(0.8)]
    before = [(torch.randn_like(t.float()) * draw.one(0, 0.1)).to(dtype) if t is not None else None for t in (h, w, b)]

    apart = draw.one(0, 0, 0, 1, 8, 16)
    lead = 0 if plain else draw.one(0, 0, 0, 1, 8)
    hidden = Placed("hidden", h, lead=0 if plain else draw.one(0, 0, 0, 1))
    weight = Placed("weight", w, lead=lead, stride=size + (0 if plain else apart))
    index, grad = Placed("index", at), Placed("grad", incoming)
    bias = Placed("bias", b) if b is not None else None
    is_global = isinstance(target, str) and target.startswith("global")
    weight_mean = Placed("weight_mean", w.mean(0, dtype=acc(dtype))) if is_global else None
    bias_mean = Placed("bias_mean", b.mean(0, dtype=acc(dtype)).reshape(1)) if is_global and b is not None else None
    loss, residual = Placed("loss", None, (rows,), acc(dtype)), Placed("residual", None, (rows, k), acc(dtype))
    code, int64 = DTYPES.index(dtype), at.dtype == torch.int64
    where, constant = center(target)
    both = {"dtype": code, "index64": int64, "hidden": hidden, "weight": weight, "weight_stride": weight.stride}
    both |= {"index": index, "weight_mean": weight_mean, "residual": residual}
    both |= {"rows": rows, "vocab_size": vocabulary, "hidden_size": size, "k": k}
    forward = both | {"bias": bias, "bias_mean": bias_mean, "loss": loss, "center": where, "constant": constant}
    phases = [Phase("linear_topk_mse", forward, ["loss", "residual"], ["loss", "residual"])]
    buffers = [hidden, weight, index, grad, loss, residual]
    buffers += [p for p in (bias, weight_mean, bias_mean) if p]

    shift = Placed("shift", None, (rows,), acc(dtype)) if through else None
    grads: list[Placed | None] = [None, None, None]
    partial = sorted_index = sorted_order = offsets = mean_row = None
    if wanted[0]:
        slices = min(-(-1024 // rows), -(-k // 32)) if rows else 1
        partial = Placed("partial", None, (slices * rows, size), acc(dtype))
        grads[0] = Placed("grad_hidden", before[0], stride=size + (0 if plain else draw.one(0, 0, 3)))
    if wanted[1] or wanted[2]:
        ordered, order = torch.sort(at.flatten(), stable=True)
        sorted_index, sorted_order = Placed("sorted_index", ordered), Placed("sorted_order", order)
        offsets = Placed("offsets", None, (vocabulary + 1,), torch.int64)
        mean_row = Placed("mean_row", None, (size,), acc(dtype)) if through and wanted[1] else None
        if wanted[1]:
            grads[1] = Placed("grad_weight", before[1], stride=size + (0 if plain else draw.one(0, 0, 3, 8)))
        if wanted[2]:
            grads[2] = Placed("grad_bias", before[2])
    of_backward = [shift, partial, sorted_index, sorted_order, offsets, mean_row, *grads]
    buffers += [p for p in of_backward if p]
    backward = both | {"grad": grad, "shift": shift, "partial": partial, "offsets": offsets, "mean_row": mean_row}
    backward |= {"sorted_index": sorted_index, "sorted_order": sorted_order}
    backward |= {"grad_hidden": grads[0], "grad_hidden_stride": grads[0].stride if grads[0] else 0}
    backward |= {"grad_weight": grads[1], "grad_weight_stride": grads[1].stride if grads[1] else 0}
    backward |= {"grad_bias": grads[2]}
    if through:
        phases.append(Phase("linear_mean_shift", backward, ["shift"], ["shift"]))
    if wanted[0]:
        phases.append(Phase("linear_grad_hidden", backward, ["partial", "grad_hidden"], ["partial"]))
    if wanted[1] or wanted[2]:
        written = ["offsets", "mean_row", "grad_weight", "grad_bias"]
        phases.append(Phase("linear_grad_weight", backward, written, ["offsets", "mean_row"]))

    def twin(h: Tensor, w: Tensor, b: Tensor | None, start: list[Tensor | None]) -> list[Tensor | None]:
        leaves = [t.clone().requires_grad_() if t is not None else None for t in (h, w, b)]
        total = eager.linear_topk_mse(leaves[0], leaves[1], at, target, leaves[2])
        if rows:
            total.backward(incoming.to(total.dtype))
        z = torch.nn.functional.linear(h, w, b)
        kept = z.gather(1, at.long()).to(total.dtype)
        c = {0: z.mean(1, keepdim=True, dtype=total.dtype), 1: kept.mean(1, keepdim=True)}.get(where, constant)
        gradients = [
            s + leaf.grad if leaf is not None and leaf.grad is not None else s
            for leaf, s in zip(leaves, start, strict=True)
        ]
        return [total.detach(), kept - c, *gradients]

    double = [t.double() if t is not None else None for t in (h, w, b, *before)]
    true, same = twin(*double[:3], double[3:]), twin(h, w, b, before)
    outputs = []
    if rows:
        # Sums of products: errors are relative to the sum of their sizes.
        sizes = double[0].abs() @ double[1].abs().t()
        sizes = (sizes + (double[2].abs() if b is not None else 0)).amax(1)
        off = torch.maximum(true[1].abs().amax(1), torch.finfo(acc(dtype)).eps * sizes)
        g = incoming.double().abs() * torch.maximum(off, sizes) * 4
        scales = [
            true[0] + sizes * off,
            sizes,
            g[:, None].expand(rows, 1) * (double[1].abs().max() if size else 0),
            (g[:, None] * k * double[0].abs()).sum() * torch.ones(vocabulary),
            (g * k).sum() * torch.ones(vocabulary),
        ]
        for p, truth, plain_value, scale in zip((loss, residual, *grads), true, same, scales, strict=True):
            if p is not None:
                outputs.append(Output(p, truth, plain_value, scale))
    text = (
        f"{short(dtype)} R {rows} V {vocabulary} d {size} K {k} {target}, bias {b is not None}, weight +{lead} "
        f"stride {weight.stride}, index {short(at.dtype)} {kind}, gradients {wanted}"
    )
    return Case("linear_topk_mse", text, buffers, phases, outputs)


def softmax_loss(
    draw: Draw,
    op: str,
    rows: int | None = None,
    vocabulary: int | None = None,
    dtype: torch.dtype | None = None,
    plain: bool = False,
    first_row: int = 0,
) -> Case:
    vocabulary = vocabulary or draw.vocabulary()
    rows = draw.rows(vocabulary) if rows is None else rows
    dtype = dtype or draw.one(*DTYPES)
    z, kind = (torch.randn(rows, vocabulary).to(dtype), "normal") if plain else draw.logits(rows, vocabulary, dtype)
    weights = torch.rand(rows, dtype=acc(dtype)) * draw.one(1, 1, 1e-3)
    if rows and draw.chance(0.3):
        weights[draw.random.randrange(rows)] = draw.one(0.0, -1.0)
    labels = torch.randint(0, vocabulary, (rows,))
    if rows and draw.chance(0.4):
        labels[0], labels[-1] = 0, vocabulary - 1
    if not plain and draw.chance(0.15) and vocabulary > 1:
        gone = torch.rand(rows, vocabulary) < draw.one(0.01, 0.5)
        gone[torch.arange(rows), labels] = False
        z[gone] = -math.inf
        kind += " with -inf"
    # `first_row`: as a slice of a matrix that begins so many rows earlier.
    lead = first_row * vocabulary % (16 // z.element_size())
    logits = Placed("logits", z, **({"lead": lead} if plain else draw.layout(vocabulary)))
    weight, loss = Placed("row_weight", weights), Placed("loss", None, (rows,), acc(dtype))
    buffers = [logits, weight, loss]
    call = {"dtype": DTYPES.index(dtype), "logits": logits, "logits_stride": logits.stride}
    call |= {"row_weight": weight, "loss": loss, "rows": rows, "vocab_size": vocabulary}
    if op == "cross_entropy_":
        label = Placed("labels", labels)
        buffers.append(label)
        call |= {"labels": label}
        launcher, twin, more = "cross_entropy_", eager.cross_entropy_, [labels]
    else:
        # The other row: like the first, or unlike it; in the same place of a 16-byte pack, or not.
        other = (
            z.clone()
            if draw.chance(0.15)
            else (z.double() + torch.randn(rows, vocabulary) * draw.one(0.01, 1, 5)).to(dtype)
        )
        if plain or draw.chance(0.3):
            other = torch.randn(rows, vocabulary).to(dtype)
        same_place = draw.chance(0.5)
        layout = {"lead": logits.pointer % 16 // logits.element, "stride": logits.stride}
        ref = Placed("ref_logits", other, **({} if plain else layout if same_place else draw.layout(vocabulary)))
        buffers.append(ref)
        reverse = op == "kl_div_ reverse"
        call |= {"ref_logits": ref, "ref_logits_stride": ref.stride, "reverse": reverse}
        launcher, twin, more = "kl_div_", eager.kl_div_, [other, reverse]

    def evaluate(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        values = z.to(dtype, copy=True)  # it is overwritten
        arguments = [m.to(dtype) if isinstance(m, Tensor) and m.is_floating_point() else m for m in more]
        w = weights.to(acc(dtype))
        return twin(values, arguments[0], w, *arguments[1:]), values

    true, same = evaluate(torch.float64), evaluate(dtype)

    def of_finite(t: Tensor) -> Tensor:
        return torch.where(t.isfinite(), t, 0).double()

    largest, probability = of_finite(z).abs(), torch.softmax(z.double(), 1)
    if op != "cross_entropy_":
        apart = (of_finite(z) - of_finite(more[0])).abs()
        largest = torch.maximum(largest, of_finite(more[0]).abs())
        if more[1]:  # P ((x - y) - the difference of the logsumexps - KL)
            probability = probability.amax(1, keepdim=True) * (1 + apart.amax(1, keepdim=True)) if rows else probability
        else:
            probability = torch.maximum(probability, torch.softmax(more[0].double(), 1))
    if rows:
        largest, probability = largest.amax(1), probability.amax(1)
    if dtype == torch.float64:  # the truth is no better
        largest, probability = largest * (1 + vocabulary / 4096), probability * (1 + vocabulary / 4096)
    outputs = [
        Output(loss, true[0], same[0], torch.clamp(largest, min=1)),
        Output(logits, true[1], same[1], weights.double().abs() * probability if rows else None),
    ]
    text = f"{short(dtype)} [{rows}, {vocabulary}], logits {kind} {logits.place()}"
    if op != "cross_entropy_":
        text += f", ref {ref.place()}"
    return Case(op, text, buffers, [Phase(launcher, call, ["logits", "loss"], ["loss"])], outputs)


def scale(draw: Draw, n: int | None = None, dtype: torch.dtype | None = None, factor: float | None = None) -> Case:
    n = draw.one(0, 1, 2, 7, 8, 9, 1000, 16383, 16384, 16385, 100_003) if n is None else n
    dtype = dtype or draw.one(*DTYPES)
    factor = draw.one(1.0, 0.0, 0.5, -1.3, 1 + 2**-30, 1e6) if factor is None else factor
    values = torch.randn(n).to(dtype)
    tensor = Placed("tensor", values, lead=draw.one(0, 1, 3, 7))
    by = Placed("factor", torch.tensor(factor, dtype=draw.one(torch.float32, torch.float64)))
    truth = values.double() * by.view.double().to(acc(dtype)).double()
    twin = values.clone().mul_(by.view)
    call = {"dtype": DTYPES.index(dtype), "factor64": by.element == 8, "tensor": tensor, "factor": by, "n": n}
    text = f"{short(dtype)} [{n}] {tensor.place()} by {factor} {short(by.view.dtype)}"
    return Case("scale_", text, [tensor, by], [Phase("scale_", call, ["tensor"])], [Output(tensor, truth, twin)])


def out_of_range(draw: Draw) -> Case:
    """What must end in a device assertion, without any access out of bounds before it."""
    kind = draw.one("topk_mse", "topk_mse_backward", "linear", "linear grad_hidden", "cross_entropy")
    value = draw.one(-1, "V", 2**31 - 1, 2**32)
    if kind.startswith("topk"):
        case = topk_mse(draw, rows=2, vocabulary=draw.one(5, 300, 40_000), k=draw.one(3, 600))
        case.phases = case.phases[kind == "topk_mse_backward" :][:1]
    elif kind.startswith("linear"):
        case = linear(draw, rows=2, vocabulary=9, size=draw.one(7, 64), k=40, target="local_mean")
        names = [phase.launcher for phase in case.phases]
        wanted = "linear_grad_hidden" if kind.endswith("grad_hidden") else "linear_topk_mse"
        if wanted not in names:
            return out_of_range(draw)
        case.phases = [case.phases[names.index(wanted)]]
    else:
        case = softmax_loss(draw, "cross_entropy_", rows=2)
    name = "labels" if kind == "cross_entropy" else "index"
    placed = next(p for p in case.buffers if p.name == name)
    entries = next(p for p in case.buffers if p.name in ("logits", "weight"))
    bound = entries.columns if entries.name == "logits" else entries.rows
    if value == "V" or value > torch.iinfo(placed.view.dtype).max:
        value = bound
    placed.initial_view.view(-1)[-1] = value
    for p in case.buffers:  # an earlier phase's results, where only a later one runs
        if p.name == "residual" and case.phases[0].launcher != "topk_mse":
            p.initial_view.fill_(0.5)
    case.op, case.text, case.asserts = "out of range", f"{kind} {name} {value}: {case.text}", True
    return case


MAKERS: dict[str, Callable[[Draw], Case]] = {
    "prefix_mask": prefix_mask,
    "topk_mse": topk_mse,
    "linear_topk_mse": linear,
    "cross_entropy_": lambda draw: softmax_loss(draw, "cross_entropy_"),
    "kl_div_": lambda draw: softmax_loss(draw, "kl_div_"),
    "kl_div_ reverse": lambda draw: softmax_loss(draw, "kl_div_ reverse"),
    "scale_": scale,
    "out of range": out_of_range,
}


def fixed() -> list[tuple[str, Callable[[Draw], Case]]]:
    """What random sizes would seldom meet: the sizes of real models, every dtype, the edges of loops."""
    cases: list[tuple[str, Callable[[Draw], Case]]] = []
    for dtype in DTYPES:
        for vocabulary in (49152, 128256, 200_003):
            for k in (1, 5000, 5121):
                cases.append(("topk_mse", lambda d, t=dtype, v=vocabulary, k=k: topk_mse(d, 2, v, k, t, "global_mean")))
            for op in ("cross_entropy_", "kl_div_", "kl_div_ reverse"):
                cases.append((op, lambda d, o=op, t=dtype, v=vocabulary: softmax_loss(d, o, 2, v, t)))
        for size in (1, 7, 64, 576, 4096):
            cases.append(("linear_topk_mse", lambda d, t=dtype, s=size: linear(d, 3, 300, s, 70, t, "global_mean")))
        cases.append(("linear_topk_mse", lambda d, t=dtype: linear(d, 0, 9, 8, 3, t)))
        cases.append(("linear_topk_mse", lambda d, t=dtype: linear(d, 1100, 50, 16, 33, t, "global_mean")))
        for n in (8 * 1024 * 2048 + 5,):  # more than the largest grid takes in one step
            cases.append(("scale_", lambda d, t=dtype, n=n: scale(d, n, t, 0.5)))
    for n in (-1, 0, 1, 3, 1000):
        for length in (1, 31, 32, 33, 256, 257, 2000):
            cases.append(("prefix_mask", lambda d, n=n, t=length: prefix_mask(d, 5, t, n)))
    return cases


def sizes_for_bytes() -> list[Callable[[Draw], Case]]:
    """Shapes of the benchmarks, a few rows of each, to count the bytes they move."""
    return [
        lambda d: topk_mse(d, 2, 128256, 5000, torch.bfloat16, "global_mean", plain=True),
        lambda d: softmax_loss(d, "cross_entropy_", 2, 128256, torch.bfloat16, plain=True),
        lambda d: softmax_loss(d, "kl_div_", 2, 128256, torch.bfloat16, plain=True),
        lambda d: softmax_loss(d, "kl_div_", 2, 128257, torch.bfloat16, plain=True, first_row=1),
        lambda d: softmax_loss(d, "kl_div_ reverse", 2, 128256, torch.bfloat16, plain=True),
        lambda d: linear(d, 8, 2000, 4096, 200, torch.bfloat16, "global_mean", plain=True),
    ]


def large_launches(machine: Machine) -> list[str]:
    """Sizes near the limits of the grid, planned but not run: each must be refused or launched whole."""
    trials = [  # launcher, what is large, sizes, how many blocks they need
        ("topk_mse", "rows 2^31", {"rows": 2**31, "vocab_size": 1, "k": 1}, 2**31),
        ("topk_mse", "rows 2^32 + 5", {"rows": 2**32 + 5, "vocab_size": 1, "k": 1}, 2**32 + 5),
        ("topk_mse_backward", "rows 2^29, 8 tiles", {"rows": 2**29, "vocab_size": 2**18 - 8, "k": 1}, 2**32),
        ("prefix_mask", "batch 2^34 + 4", {"batch": 2**34 + 4, "length": 1, "n": 1}, 2**32 + 1),
        ("cross_entropy_", "rows 2^32 + 5", {"rows": 2**32 + 5, "vocab_size": 1}, 2**32 + 5),
        ("linear_topk_mse", "rows K 2^36", {"rows": 2**20, "vocab_size": 9, "hidden_size": 8, "k": 2**16}, 2**33),
    ]
    lines = []
    for launcher, what, sizes, needed in trials:
        machine.begin(dry=True)
        members = [name for name, _ in machine.structs[launcher]._fields_]
        machine.call(launcher, dict.fromkeys(members) | sizes)
        report = machine.report()
        refused = any(line[0] == "violation" for line in report)
        grid = next(line[1] for line in report if line[0] == "launch").split(" grid ")[1].split()[0]
        whole = int(grid.split(",")[0]) == needed
        outcome = "CUDA refuses it" if refused else "LAUNCHED" if whole else "TRUNCATED, wrong results"
        lines.append(f"{launcher} {what}: needs {needed} blocks, grid {grid}: {outcome}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("project", type=Path)
    parser.add_argument("--cases", type=int, default=300, help="random ones of each op")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="parts of the names of ops, separated by commas")
    parser.add_argument("--quick", action="store_true", help="two schedules a case instead of five, no fixed cases")
    parser.add_argument("--folder", type=Path, help="where to build; what is there already is used")
    parser.add_argument("--arch", type=int, nargs="+", default=list(rewrite.ARCHITECTURES))
    parser.add_argument("--jobs", type=int, default=1, help="compilers at a time")
    parser.add_argument("--bytes", action="store_true", help="count the bytes of a few large cases, nothing else")
    options = parser.parse_args()
    torch.set_num_threads(1)
    spec = importlib.util.spec_from_file_location("eager", options.project / "palu" / "eager.py")
    global eager
    eager = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(eager)

    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        schedules = QUICK if options.quick else SCHEDULES
        kinds = list(dict.fromkeys(kind for kind, _, _ in schedules))
        libraries = {(a, kind): folder / f"emulated_{a}_{kind}.so" for a in options.arch for kind in kinds}
        if not all(path.exists() for path in libraries.values()):
            began = time.perf_counter()
            libraries = rewrite.build(options.project, folder, options.arch, kinds, options.jobs)
            print(f"built in {time.perf_counter() - began:.0f} s", flush=True)
        structs = read_structs(options.project / rewrite.CSRC)
        machines = {key: Machine(path, structs) for key, path in libraries.items()}
        driver = Driver(machines, schedules)
        if options.bytes:
            driver.schedules = [("checked", 0, 0)]
            for number, make in enumerate(sizes_for_bytes()):
                driver.run(make(Draw(number)), show_bytes=True)
            return driver.summary()
        wanted = [part for part in options.only.split(",") if part]
        chosen = {op: make for op, make in MAKERS.items() if not wanted or any(part in op for part in wanted)}
        if not options.quick:
            for number, (op, make) in enumerate(fixed()):
                if op in chosen:
                    driver.run(make(Draw(10**6 + number)))
        for op, make in chosen.items():
            for number in range(options.cases):
                driver.run(make(Draw(options.seed + number)))
            print(f"{op}: {driver.cases[op]} cases, {driver.seconds[op]:.0f} s", flush=True)
        if not options.quick:
            print("\nLaunches near the limits of the grid:", *large_launches(next(iter(machines.values()))), sep="\n  ")
        return driver.summary()


if __name__ == "__main__":
    sys.exit(main())
