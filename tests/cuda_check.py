"""Compile every CUDA kernel with nvcc, and tell what became of it: `make cuda-check`. Needs neither GPU nor CUDA torch.

It compiles with the flags of torch's own builds, for the architectures of ARCHITECTURES (register.cpp by the C++
compiler, for its errors alone), and prints of each kernel on sm_80 and sm_90: registers of a thread, bytes that did not
fit into them (spilt), shared memory of a block, how many blocks fit on a multiprocessor, and of each innermost loop
with 16-byte loads: its instructions, these loads, how many are issued before one is waited for, and the instructions
for each element that is loaded.

Exits 1 if a file does not compile, or a kernel of bfloat16 or float16 spills.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from torch.utils import cpp_extension

from palu import _build

ARCHITECTURES = (75, 80, 90, 120)
SHOWN = (80, 90)
# Of a multiprocessor (CUDA C++ Programming Guide, table of compute capabilities): threads, bytes of shared memory.
PROCESSORS = {80: (2048, 164 * 1024), 90: (2048, 228 * 1024)}
REGISTERS, BLOCKS, RESERVED = 65536, 32, 1024  # RESERVED: bytes of shared memory that each block takes beside its own
ELEMENTS = {"double": 2, "float": 4, "__half": 8, "__nv_bfloat16": 8}  # of a 16-byte load


@dataclass
class Kernel:
    """What the compiler made of a kernel, for one architecture."""

    name: str
    architecture: int
    registers: int = 0
    spilt: int = 0  # bytes a thread
    shared: int = 0  # bytes a block
    threads: int = 0  # a block
    instructions: list[tuple[int, str]] = field(default_factory=list)  # (address, text)

    @property
    def blocks(self) -> int:
        """How many blocks fit on a multiprocessor."""
        threads, shared = PROCESSORS[self.architecture]
        of_warp = -(-self.registers * 32 // 256) * 256
        by_registers = REGISTERS // (of_warp * -(-self.threads // 32))
        return min(BLOCKS, threads // self.threads, by_registers, shared // (self.shared + RESERVED))

    def loops(self) -> Iterator[list[str]]:
        """Yield the instructions of a round of each innermost loop with 16-byte loads, on the way with fewest a load.

        That is the way of rows that begin at 16 bytes, and of packs within them.
        """
        jumps = {at: int(found[1], 16) for at, text in self.instructions if (found := _JUMP.search(text))}
        wide = [at for at, text in self.instructions if _LOAD.search(text)]
        loops = {(to, at) for at, to in jumps.items() if to <= at and any(to <= load <= at for load in wide)}
        for to, at in sorted(loops):
            if not any(loop != (to, at) and to <= loop[0] and loop[1] <= at for loop in loops):
                ways = [
                    self._way(to, load, (to, at), jumps)[:-1] + self._way(load, at, (to, at), jumps)
                    for load in wide
                    if to <= load <= at
                ]
                yield min(ways, key=lambda way: len(way) / sum(bool(_LOAD.search(text)) for text in way))

    def _way(self, start: int, end: int, loop: tuple[int, int], jumps: dict[int, int]) -> list[str]:
        """Return the instructions of the shortest way from one address of a loop to another."""
        texts = dict(self.instructions)
        after = {a: b for (a, _), (b, _) in pairwise(self.instructions)}
        before = {start: -1}
        reached = deque([start])
        while end not in before:
            at = reached.popleft()
            always = at in jumps and not texts[at].startswith("@")
            for place in ([] if always else [after.get(at)]) + [jumps.get(at)]:
                if place is not None and loop[0] <= place <= loop[1] and place not in before:
                    before[place] = at
                    reached.append(place)
        way, at = [], end
        while at != -1:
            way.append(texts[at])
            at = before[at]
        return way[::-1]


_JUMP = re.compile(r"\bBRA(?:\.\w+)* (?:[!U]?P\d+, )?`?\(?0x([0-9a-f]+)")
_LOAD = re.compile(r"\bLDG\.E\.128\S* (R\d+)")


def _in_flight(body: list[str]) -> int:
    """Count the loads that are issued before the first instruction that needs what one of them has loaded."""
    most, loaded = 0, set[str]()
    for text in body:
        found = _LOAD.search(text)
        operands = text.partition(",")[2] if found else text
        if loaded & set(re.findall(r"\bR\d+\b", operands)):
            most, loaded = max(most, len(loaded) // 4), set()
        if found:
            first = int(found[1][1:])
            loaded |= {f"R{first + i}" for i in range(4)}
    return max(most, len(loaded) // 4)


def common_flags() -> list[str]:
    """Return what both compilers get."""
    # torch's CPU wheel has c10's CUDA headers, but for the one that its build generates: this does without it.
    flags = ["-std=c++" + _build.cxx_standard(), "-DC10_USING_CUSTOM_GENERATED_MACROS"]
    for path in [*cpp_extension.include_paths(), sysconfig.get_paths()["include"]]:
        flags += ["-isystem", path]
    return flags


def nvcc_command(source: Path, target: Path) -> list[str]:
    """Return the command that compiles a file as torch's builds do."""
    flags = ["-Xcompiler=-fPIC", *cpp_extension.COMMON_NVCC_FLAGS, *_build.NVCC_FLAGS, *common_flags()]
    flags += [f"-gencode=arch=compute_{number},code=sm_{number}" for number in ARCHITECTURES]
    return ["nvcc", *flags, "-c", str(source), "-o", str(target)]


def cxx_command(source: Path, nvcc: str) -> list[str]:
    """Return the command that compiles a C++ file against CUDA's headers, for its errors alone."""
    headers = str(Path(nvcc).parents[1] / "include")
    return [cpp_extension.get_cxx_compiler(), "-fsyntax-only", *common_flags(), "-isystem", headers, str(source)]


def read_kernels(path: Path, architecture: int) -> list[Kernel]:
    """Read what is in an object, by CUDA's own tools."""

    def dump(*options: str) -> str:
        command = ["cuobjdump", f"-arch=sm_{architecture}", *options, str(path)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    found: dict[str, Kernel] = {}
    usage = r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    for name, registers, stack, shared, local in re.findall(usage, dump("-res-usage")):
        found[name] = Kernel(name, architecture, int(registers), int(stack) + int(local), int(shared))
    elf = dump("-elf")
    for name, section in re.findall(r"^\.nv\.info\.(\w+)\n(.*?)(?=^\.|\Z)", elf, re.MULTILINE | re.DOTALL):
        if threads := re.search(r"EIATTR_MAX_THREADS\s+Format:\s+\w+\s+Value:\s+0x(\w+) 0x(\w+)", section):
            found[name].threads = int(threads[1], 16) * int(threads[2], 16)
    for name, body in re.findall(r"Function : (\w+)\n(.*?)(?=\n\s+Function :|\Z)", dump("-sass"), re.DOTALL):
        lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?) ;", body, re.MULTILINE)
        found[name].instructions = [(int(address, 16), text) for address, text in lines]
    names = subprocess.run(["c++filt"], input="\n".join(found), capture_output=True, text=True, check=True).stdout
    for kernel, pretty in zip(found.values(), names.splitlines(), strict=True):
        kernel.name = re.sub(r"palu::cuda::|\(anonymous namespace\)::|^void ", "", pretty).partition("(")[0]
        if kernel.name.startswith("topk_backward"):  # asks for it when it is launched
            element = 16 // ELEMENTS[kernel.name.partition("<")[2].partition(",")[0]]
            kernel.shared += TILE + 2 * (TILE // element) // 8
    return list(found.values())


TILE = 1024 * int(re.search(r"kTileBytes = (\d+) \* 1024", (_build.CSRC / "cuda" / "topk.cu").read_text())[1])  # type: ignore[index]


def table(kernels: list[Kernel]) -> str:
    """Format the kernels, an instance and architecture a line."""
    lines = [f"{'kernel':58} {'sm':>3} {'regs':>4} {'spilt':>5} {'shared':>6} {'blocks':>6}  loops with 16-byte loads"]
    for kernel in sorted(kernels, key=lambda kernel: (kernel.name, kernel.architecture)):
        dtype = re.search(r"<(\w+)", kernel.name)
        pack = ELEMENTS.get(dtype[1], 4) if dtype else 4
        loops = []
        for way in kernel.loops():
            loads = sum(bool(_LOAD.search(text)) for text in way)
            per_element = f"{len(way) / (loads * pack):.1f} an element"
            loops.append(f"{len(way)} instructions, {loads} loads, {_in_flight(way)} at once, {per_element}")
        numbers = f"{kernel.registers:4} {kernel.spilt:5} {kernel.shared:6} {kernel.blocks:6}"
        lines.append(f"{kernel.name:58} {kernel.architecture:3} {numbers}  {'; '.join(loops)}".rstrip())
    return "\n".join(lines)


def main() -> int:
    if (nvcc := shutil.which("nvcc")) is None:
        raise SystemExit("nvcc is not on PATH")
    sources = sorted((_build.CSRC / "cuda").glob("*.cu"))
    register = _build.CSRC / "cuda" / "register.cpp"
    with tempfile.TemporaryDirectory() as scratch:
        objects = [Path(scratch, f"{source.stem}.o") for source in sources]
        commands = [nvcc_command(*pair) for pair in zip(sources, objects, strict=True)]
        commands.append(cxx_command(register, nvcc))
        with ThreadPoolExecutor(2) as pool:
            codes = list(pool.map(lambda command: subprocess.run(command, check=False).returncode, commands))
        failed = [source.name for source, code in zip([*sources, register], codes, strict=True) if code]
        made = [path for path in objects if path.exists()]
        kernels = [kernel for path in made for number in SHOWN for kernel in read_kernels(path, number)]
    if unbound := {kernel.name for kernel in kernels if not kernel.threads}:
        raise SystemExit(f"no __launch_bounds__, so that nobody can say how many blocks fit: {', '.join(unbound)}")
    print(table(kernels))
    spilt = [kernel.name for kernel in kernels if kernel.spilt and "<__" in kernel.name]
    for what, names in (("does not compile", failed), ("spills", spilt)):
        print(*(f"{name}: {what}" for name in names), sep="\n", end="\n" if names else "")
    versions = ", ".join(f"sm_{number}" for number in ARCHITECTURES)
    print(
        f"{len(sources)} files for {versions}, and register.cpp: {len(failed)} failed, {len(set(spilt))} kernels spill"
    )
    return 1 if failed or spilt else 0


if __name__ == "__main__":
    sys.exit(main())
