"""Faults planted in a copy of the kernels, each of which the emulation must find: a test of the emulation itself."""

import re
from pathlib import Path
from typing import NamedTuple

import cases
import compiler
from machine import Finding, Machine

PREFIX = "fault/"
ARCHITECTURE = 900
DISPATCH = "csrc/cuda/common.cuh"
OTHER_DTYPES = re.compile(r"(case Dtype::k(?:Double|Half|BFloat16):) return f\(\S+\);")
FAULT = re.compile(r"^([\w-]+): ([\w.]+)(?: in ([\w.]+))?, (\S+), (.+)\n((?:- .*\n)+)((?:\+ .*\n)+)", re.MULTILINE)


class Fault(NamedTuple):
    """One fault of faults.txt: a text of a kernel as it is, and with the fault."""

    name: str
    file: str  # in csrc/cuda
    kernels: str  # of a header: the .cu file that is compiled with the fault
    case: str  # which must find it
    kind: str  # as what
    right: str
    wrong: str


def faults() -> dict[str, Fault]:
    """Read all faults, by their names as cases."""
    found = [Fault(*fields) for fields in FAULT.findall(compiler.HERE.joinpath("faults.txt").read_text())]
    return {PREFIX + f.name: f._replace(right=_text(f.right), wrong=_text(f.wrong)) for f in found}


def _text(marked: str) -> str:
    return "\n".join(line[2:] for line in marked.splitlines())


def run(name: str, folder: Path) -> tuple[str, list[Finding]]:
    """Compile the kernels with one fault, for float32 alone, and run its case.

    Returns as what and where the fault was found, and what is wrong with the emulation.
    """
    fault = faults()[name]
    path = f"csrc/cuda/{fault.file}"
    texts = compiler.read_sources()
    times = texts[path].count(fault.right)
    if times != 1:
        details = f"{path} has this {times} times, not once: {fault.right}"
        return "", [Finding("a fault that cannot be planted", fault.name, ARCHITECTURE, details)]
    texts[path] = texts[path].replace(fault.right, fault.wrong)
    texts[DISPATCH] = OTHER_DTYPES.sub(r"\1 return;", texts[DISPATCH])
    library = compiler.build_changed(folder, ARCHITECTURE, f"csrc/cuda/{fault.kernels or fault.file}", texts)
    machine = Machine(library, ARCHITECTURE)
    outcome = machine.run(cases.make(fault.case), cases.seed_of(fault.case))
    machine.library.emu_end()  # gives memory back
    found = [f"{finding.kind} at {finding.place or finding.details}" for finding in outcome.findings]
    as_expected = [text for text in found if text.startswith(f"{fault.kind} at ")]
    if as_expected:
        return as_expected[0], []
    details = f"{fault.case} must find {fault.kind!r} in {path} with `{fault.wrong}`; found: {found or 'nothing'}"
    return "", [Finding("a planted fault that is not found", fault.name, ARCHITECTURE, details)]
