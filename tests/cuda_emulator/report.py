"""Gather what the cases came to, and print it."""

import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import plant
from compiler import ROOT
from machine import SCHEDULES, Finding, Outcome


@dataclass
class Done:
    """What one case came to."""

    name: str
    seed: int
    text: str  # its sizes, dtypes and layout
    outcomes: list[Outcome] = field(default_factory=list)  # one for each architecture
    instances: dict[int, dict[str, bool]] = field(default_factory=dict)  # by architecture: was it launched?

    @property
    def op(self) -> str:
        """The first part of the name."""
        return self.name.partition("/")[0]


class Report:
    """Counts, largest errors and findings of all cases."""

    def __init__(self, architectures: list[int]) -> None:
        self.architectures = architectures
        self.cases: Counter[str] = Counter()
        self.errors: dict[tuple[str, str], dict[str, float]] = {}  # by op and tensor, then dtype
        self.launched: dict[int, dict[str, bool]] = {architecture: {} for architecture in architectures}
        # By op, kind and place: the first one, its case, and how many there are.
        self.findings: dict[tuple[str, str, str, int], tuple[Finding, Done, int]] = {}
        self.faults: list[str] = []  # that were planted and found

    def add(self, done: Done) -> None:
        """Add what a case came to."""
        self.cases[done.op] += 1
        if done.name.startswith(plant.PREFIX) and done.text:
            self.faults.append(f"{done.name.removeprefix(plant.PREFIX)}: {done.text}")
        for outcome in done.outcomes:
            for finding in outcome.findings:
                key = done.op, finding.kind, finding.place, finding.architecture
                first, case, count = self.findings.get(key, (finding, done, 0))
                self.findings[key] = first, case, count + 1
            for (tensor, dtype), units in outcome.errors.items():
                of = self.errors.setdefault((done.op, tensor), {})
                of[dtype] = max(of.get(dtype, 0.0), units)
        for architecture, instances in done.instances.items():
            for name, launched in instances.items():
                self.launched[architecture][name] = launched or self.launched[architecture].get(name, False)

    def text(self, complete: bool) -> str:
        """Return the tables and the findings. `complete`: every instance of a kernel must have been launched."""
        lines = [f"\n{'op':26}{'cases':>7}", *(f"{op:26}{count:7}" for op, count in self.cases.items())]
        if self.errors:
            lines.append("\nLargest errors, in rounding units (README.md):")
        for (op, tensor), by_dtype in sorted(self.errors.items()):
            cells = "".join(f"  {dtype} {units:.1f}" for dtype, units in sorted(by_dtype.items()))
            lines.append(f"{op:26}{tensor:12}{cells}")
        if self.faults:
            lines += ["\nPlanted faults, and as what they were found:", *sorted(self.faults)]
        if complete:
            lines += self._check_instances()
        for (op, kind, place, architecture), (finding, done, count) in self.findings.items():
            lines += [
                f"\nFOUND {count}x {kind}{f' at {place}' if place else ''}, {op}, __CUDA_ARCH__ {architecture}",
                f"    {finding.details.strip()}",
                f"    first in {done.name}, seed {done.seed}: {done.text}",
                f"    again: {command(done.name, architecture)}",
            ]
        total, runs = sum(self.cases.values()), len(SCHEDULES) * len(self.architectures)
        lines.append(f"\n{total} cases, {runs} runs each, {len(self.findings)} findings")
        return "\n".join(lines)

    def _check_instances(self) -> list[str]:
        lines = [""]
        for architecture, instances in self.launched.items():
            missing = [name for name, launched in instances.items() if not launched]
            lines.append(
                f"__CUDA_ARCH__ {architecture}: {len(instances) - len(missing)} of {len(instances)} instances of "
                "kernels launched"
            )
            for name in missing:
                finding = Finding("never launched", name, architecture, "no case reaches this instance of a kernel")
                self.findings["all", finding.kind, name, architecture] = finding, Done("all", 0, ""), 1
        return lines


def command(name: str, architecture: int) -> str:
    """Return the command that runs one case alone."""
    python, here = Path(sys.executable), Path.cwd()
    script = ROOT / "tests" / "cuda_emulator" / "run.py"
    shown = [path.relative_to(here) if path.is_relative_to(here) else path for path in (python, script)]
    return f"{shown[0]} {shown[1]} --case {name} --arch {architecture}"
