"""Compile a project's CUDA kernels for the emulation: rewrite what is not C++, then call g++.

    python tests/cuda_emulator/rewrite.py . FOLDER  # writes FOLDER/emulated_{arch}_{kind}.so

Kinds: "fast" runs the kernels as they are, "checked" sees every access (emulate.cpp says how).
"""

import argparse
import re
import subprocess
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
CSRC = "csrc"  # of the project
ARCHITECTURES = (800, 900)  # before Hopper, Hopper
KINDS = ("fast", "checked")

FLAGS = ["-std=c++20", "-O2", "-g", "-fPIC", "-fno-strict-aliasing", "-fno-gnu-unique"]
FLAGS += ["-Wall", "-Wno-unknown-pragmas", "-Wno-unused-but-set-variable"]
# nvcc contracts a*b+c to an FMA wherever it can.
FLAGS += ["-ffp-contract=fast"]
# These only put in the calls; without them at link time, they come to emulate.cpp.
CHECKED = ["-fsanitize=thread", "-fsanitize=undefined", "-fno-sanitize=vptr"]

LAUNCH = re.compile(r"([A-Za-z_]\w*(?:<(?:[^<>;]|<[^<>;]*>)*>)?)\s*<<<(.+?)>>>\s*\(", re.DOTALL)
SHARED = re.compile(r"(?<!extern )__shared__\s+([\w:]+)\s+(\w+)\s*((?:\[[^\]]*\])*)\s*;")
DYNAMIC_SHARED = re.compile(r"extern\s+__shared__\s+([\w:]+)\s+(\w+)\s*\[\s*\]\s*;")
ASM = re.compile(r"\basm\s*(?:volatile\s*)?\(")


def rewrite(text: str, name: str) -> str:
    """CUDA C++ as C++; every line keeps its number."""

    def keeping_lines(new: str, old: str) -> str:
        return new + "\n" * (old.count("\n") - new.count("\n"))

    def launch(match: re.Match[str]) -> str:
        kernel, config = match.groups()
        quoted = re.sub(r"\s+", " ", kernel)
        new = f'::emu::launcher("{quoted}", [](auto... a) {{ {quoted}(a...); }}, {config})('
        return keeping_lines(new, match[0])

    text = DYNAMIC_SHARED.sub(r"auto* const \2 = static_cast<\1*>(::emu::dynamic_shared());", text)
    text = SHARED.sub(r"auto& \2 = ::emu::shared_variable<\1\3>([] {});", text)
    text = LAUNCH.sub(launch, text)
    while found := ASM.search(text):
        inside, end = balanced(text, found.end())
        text = text[: found.start()] + keeping_lines(assembly(inside), text[found.start() : end]) + text[end:]
    return f'#line 1 "{name}"\n{text}'


def balanced(text: str, start: int) -> tuple[str, int]:
    """What is between a bracket that ends before `start` and its partner, and where that ends."""
    depth, at = 1, start
    while depth:
        if text[at] == '"':
            at = text.index('"', at + 1)
        depth += {"(": 1, ")": -1}.get(text[at], 0)
        at += 1
    return text[start : at - 1], at


def assembly(inside: str) -> str:
    """`"a.b %0, %1;" : "=f"(y) : "f"(x)` as `::ptx::a_b(y, x)`."""
    mnemonic = re.match(r'\s*"\s*([\w.]+)', inside)
    if mnemonic is None or inside.count(";") != 1:
        raise ValueError(f"not one PTX instruction: asm({inside})")
    operands = []
    for found in re.finditer(r'"[=+]?&?\w+"\s*\(', inside):
        if inside[: found.start()].count('"') % 2 == 0:
            operands.append(" ".join(balanced(inside, found.end())[0].split()))
    return f"::ptx::{mnemonic[1].replace('.', '_')}({', '.join(operands)})"


def has_fma() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "fma" in cpuinfo.read_text().split()


def build(
    project: Path,
    folder: Path,
    architectures: Iterable[int] = ARCHITECTURES,
    kinds: Iterable[str] = KINDS,
    jobs: int = 1,
) -> dict[tuple[int, str], Path]:
    """Rewrite the sources and compile a library for each architecture and kind."""
    sources = folder / CSRC
    (sources / "cuda").mkdir(parents=True, exist_ok=True)
    for path in sorted([*(project / CSRC).glob("*.h"), *(project / CSRC / "cuda").glob("*.[ch]*")]):
        if path.suffix == ".cpp":  # register.cpp needs torch
            continue
        name = path.relative_to(project)
        target = folder / (f"{name}.cpp" if path.suffix == ".cu" else name)
        target.write_text(rewrite(path.read_text(), str(name)))

    libraries, commands, links = {}, [], []
    for architecture in architectures:
        for kind in kinds:
            flags = [*FLAGS, *(["-mfma"] if has_fma() else []), f"-D__CUDA_ARCH__={architecture}"]
            flags += [f"-I{HERE / 'include'}", f"-I{sources / 'cuda'}"]
            objects = []
            for path in [HERE / "emulate.cpp", HERE / "wrappers.cpp", *sorted((sources / "cuda").glob("*.cu.cpp"))]:
                mine = path.parent == HERE
                special = [] if kind == "fast" else ["-DEMU_CHECKED"] if mine else CHECKED
                objects.append(folder / f"{path.stem}_{architecture}_{kind}.o")
                commands.append(["g++", *flags, *special, "-c", str(path), "-o", str(objects[-1])])
            libraries[architecture, kind] = folder / f"emulated_{architecture}_{kind}.so"
            link = ["g++", "-shared", "-Wl,-z,defs", *map(str, objects), "-o", str(libraries[architecture, kind])]
            links.append([*link, "-ldl"])
    with ThreadPoolExecutor(jobs) as pool:
        for steps in (commands, links):
            list(pool.map(lambda command: subprocess.run(command, check=True), steps))
    return libraries


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("project", type=Path)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    for library in build(options.project, options.folder).values():
        print(library)
