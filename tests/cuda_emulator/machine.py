"""Run one case on the emulated machine: tensors in guarded memory, calls of the launchers, what was found."""

import ctypes
import re
import subprocess
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import compiler
import torch
from helpers.compare import compare
from torch import Tensor

GUARD = 4096  # bytes around every tensor


def as_bits(values: Tensor) -> Tensor:
    """View a tensor as integers of the same size."""
    return values.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.dtype.itemsize])


class Placed:
    """A vector or a matrix that begins `lead` elements past a 16-byte boundary, its rows `stride` elements apart.

    Everything around it and between its rows is 0xFF: NaN as a float, -1 as an integer. `values` None: an output of
    this `shape` and `dtype`, filled with the same.
    """

    def __init__(
        self,
        name: str,
        values: Tensor | None,
        shape: tuple[int, ...] = (),
        dtype: torch.dtype = torch.float32,
        *,
        lead: int = 0,
        stride: int | None = None,
    ) -> None:
        if values is not None:
            shape, dtype = tuple(values.shape), values.dtype
        self.name, self.element = name, dtype.itemsize
        self.rows, self.columns = (1, *shape)[-2:] if shape else (1, 1)
        self.stride = self.columns if stride is None else stride
        span = (self.rows - 1) * self.stride + self.columns if self.rows and self.columns else 0
        begin = GUARD + lead * self.element
        end = begin + max(span, 1) * self.element
        strides = (self.stride, 1)[2 - len(shape) :] if shape else ()
        self._elements_of = lambda memory: memory[begin:end].view(dtype).as_strided(shape, strides)
        self.bytes = torch.full((begin + -(-span * self.element // 16) * 16 + GUARD,), 0xFF, dtype=torch.uint8)
        self.pointer = self.bytes[begin:].data_ptr()
        self.view = self._elements_of(self.bytes)
        if values is not None:
            self.view.copy_(values)
        self.initial = self.bytes.clone()  # what a run begins with
        self.initial_view = self._elements_of(self.initial)

    def place(self) -> str:
        """Say how many elements past a 16-byte boundary it begins, and its stride."""
        return f"+{self.pointer % 16 // self.element} stride {self.stride}"

    def reset(self) -> None:
        """Make it what it was when a run began."""
        self.bytes.copy_(self.initial)

    def is_intact(self) -> bool:
        """Say whether all that is not an element is as it was when the run began."""
        expected = self.initial.clone()
        as_bits(self._elements_of(expected)).copy_(as_bits(self.view))
        return torch.equal(expected, self.bytes)


@dataclass
class Phase:
    """One call of a launcher: the members of its struct are the case's buffers, their strides, and numbers."""

    launcher: str
    numbers: dict[str, Any]  # for this and other launchers; what has none is 0
    writes: list[str]  # the names of the tensors that it may write to
    fresh: list[str] = field(default_factory=list)  # of these, what must not be read before it is written


@dataclass
class Output:
    """A tensor that a case writes, and what it must be."""

    placed: Placed
    truth: Tensor  # in float64
    twin: Tensor | None  # of plain torch in the case's dtypes
    scale: Tensor | None = None  # what an error is relative to, besides the row's largest value


@dataclass
class Case:
    """Calls of launchers, and their outputs."""

    text: str  # sizes, dtypes, layout
    buffers: list[Placed]
    phases: list[Phase]
    outputs: list[Output]
    must_assert: bool = False  # a device assertion is what must happen
    largest_cluster: int = 8  # blocks of a cluster that the device has room for


@dataclass(frozen=True)
class Schedule:
    """In which order threads and blocks run, and how often they are interrupted."""

    name: str
    order: int  # 0 forward, 1 reverse, 2 random
    preempt: int  # one access in so many is followed by another thread; 0: none


SCHEDULES = [Schedule("in order", 0, 0), Schedule("in reverse order", 1, 0), Schedule("in random order", 2, 7)]


@dataclass(frozen=True)
class Finding:
    """What a case should not have shown."""

    kind: str  # "race", "out of bounds", "wrong result", ...
    place: str  # the line of the kernel, or the tensor
    architecture: int
    details: str


@dataclass
class Outcome:
    """What the runs of a case came to."""

    findings: list[Finding] = field(default_factory=list)
    # By tensor and dtype, in rounding units (helpers/compare.py).
    errors: dict[tuple[str, str], float] = field(default_factory=dict)


@cache
def read_structs() -> dict[str, type[ctypes.Structure]]:
    """Read from launch.h the struct that each launcher takes, by the launcher's name."""
    text = re.sub(r"//.*", "", compiler.read_sources()["csrc/cuda/launch.h"])
    c_types: dict[str, Any] = {"bool": ctypes.c_bool, "int64_t": ctypes.c_int64, "double": ctypes.c_double}
    c_types |= {"Dtype": ctypes.c_int, "Center": ctypes.c_int}
    structs = {}
    for struct, body in re.findall(r"struct (\w+) \{(.*?)\};", text, re.DOTALL):
        fields = []
        for kind, names in re.findall(r"(?:const )?(\w+\*?) ([\w, ]+);", body):
            of = ctypes.c_void_p if kind.endswith("*") else c_types[kind]
            fields += [(name, of) for name in names.split(", ")]
        structs[struct] = type(struct, (ctypes.Structure,), {"_fields_": fields})
    launchers = re.findall(r"void (\w+)\(const (\w+)& p, cudaStream_t stream\);", text)
    return {launcher: structs[struct] for launcher, struct in launchers}


class Machine:
    """The kernels of one architecture, in one library."""

    def __init__(self, path: Path, architecture: int) -> None:
        self.path, self.architecture = path, architecture
        self.library = ctypes.CDLL(str(path))
        self.library.emu_report.restype = ctypes.c_char_p
        self.library.emu_instances.restype = ctypes.c_char_p

    def instances(self) -> dict[str, bool]:
        """Return every compiled instance of a kernel, and whether a launch of this process was of it."""
        lines = self.library.emu_instances().decode().splitlines()
        return {_short_name(name): launched == "1" for launched, name in (line.split("\t") for line in lines)}

    def run(self, case: Case, seed: int) -> Outcome:
        """Run a case in every schedule; the results must be right, and have the same bits each time."""
        outcome = Outcome()
        first: list[Tensor] = []
        for schedule in SCHEDULES:
            findings, assertions = [], 0
            for placed in case.buffers:
                placed.reset()
            for phase in case.phases:
                self._begin(case, phase, schedule, seed)
                self._call(case, phase)
                for line in self.library.emu_report().decode().splitlines():
                    kind, place, details = line.split("\t")
                    if kind == "assertion" and case.must_assert:
                        assertions += 1
                    else:
                        findings.append(self._finding(kind, self._source_line(place), f"{schedule.name}: {details}"))
            if case.must_assert:
                if not assertions:
                    findings.append(self._finding("no device assertion", "", schedule.name))
            else:
                results = [output.placed.view.clone() for output in case.outputs]
                if not findings:
                    findings += self._compare(case, results, first, outcome)
                first = first or results
            findings += [
                self._finding("written around", placed.name, schedule.name)
                for placed in case.buffers
                if not placed.is_intact()
            ]
            outcome.findings += findings
        return outcome

    def _finding(self, kind: str, place: str, details: str) -> Finding:
        return Finding(kind, place, self.architecture, details)

    def _begin(self, case: Case, phase: Phase, schedule: Schedule, seed: int) -> None:
        self.library.emu_begin(schedule.order, ctypes.c_uint64(seed), schedule.preempt)
        self.library.emu_largest_cluster(case.largest_cluster)
        for placed in case.buffers:
            numbers = [placed.element, placed.rows, placed.columns, placed.stride]
            self.library.emu_buffer(
                placed.name.encode(),
                ctypes.c_void_p(placed.pointer),
                *[ctypes.c_int64(n) for n in numbers],
                int(placed.name in phase.writes),
                int(placed.name not in phase.fresh),
            )

    def _call(self, case: Case, phase: Phase) -> None:
        struct = read_structs()[phase.launcher]
        values = dict(phase.numbers)
        for placed in case.buffers:
            values |= {placed.name: placed.pointer, f"{placed.name}_stride": placed.stride}
        p = struct(**{name: values[name] for name, *_ in struct._fields_ if name in values})
        function = getattr(self.library, f"palu_{phase.launcher}")
        function.restype = ctypes.c_bool
        if not function(ctypes.byref(p), ctypes.c_int64(ctypes.sizeof(p))):
            raise TypeError(f"{struct.__name__} has another size in {self.path}")

    def _compare(self, case: Case, results: list[Tensor], first: list[Tensor], outcome: Outcome) -> list[Finding]:
        """Compare a run's results with the first run's, or, the first time, with the truth."""
        findings = []
        for number, (output, got) in enumerate(zip(case.outputs, results, strict=True)):
            name = output.placed.name
            if first:
                if not torch.equal(as_bits(got), as_bits(first[number])):
                    findings.append(self._finding("depends on the schedule", name, "other bits in another order"))
                continue
            dtype = str(got.dtype).removeprefix("torch.")
            wrong, outcome.errors[name, dtype] = compare(got, output.truth, output.twin, output.scale)
            if wrong:
                findings.append(self._finding("wrong result", name, wrong))
        return findings

    def _source_line(self, place: str) -> str:
        if place in ("0", "0x0"):
            return ""
        command = ["addr2line", "-s", "-e", str(self.path), place]
        line = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        return line.partition(" (discriminator")[0]


def _short_name(pretty: str) -> str:
    """Shorten g++'s name of a lambda in a kernel to the kernel's, with its template's arguments."""
    kernel = re.search(r"(\w+(?:<[^()]*>)?)\(", pretty)
    return kernel[1] if kernel else pretty
