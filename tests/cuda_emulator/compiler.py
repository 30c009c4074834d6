"""Compile the kernels of `csrc/cuda` and the emulated machine into one library for each architecture.

Objects are named after a digest of all that goes into them, so that only what changed is compiled again.
"""

import hashlib
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import rewrite

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
ARCHITECTURES = (800, 900)  # of __CUDA_ARCH__: before Hopper, Hopper
FLAGS = ["-std=c++20", "-O2", "-g", "-fPIC", "-fno-strict-aliasing", "-fno-gnu-unique"]
FLAGS += ["-Wall", "-Wno-unknown-pragmas", "-Wno-unused-but-set-variable"]
# nvcc contracts a*b+c to an FMA wherever it can.
FLAGS += ["-ffp-contract=fast"]
# For the kernels. These only put in the calls; without them at link time, they come to accesses.cpp.
CHECKS = ["-fsanitize=thread", "-fsanitize=undefined", "-fno-sanitize=vptr"]

MACHINE = ("emulate.cpp", "accesses.cpp", "wrappers.cpp")

Texts = dict[str, str]  # of the sources, by their path from the root of the repository


def read_sources() -> Texts:
    """Read what the kernels are compiled from. register.cpp is left out: it needs torch."""
    csrc = ROOT / "csrc"
    paths = [*csrc.glob("*.h"), *(csrc / "cuda").glob("*.h"), *(csrc / "cuda").glob("*.cu*")]
    return {str(path.relative_to(ROOT)): path.read_text() for path in sorted(paths)}


def build(folder: Path, architectures: list[int], jobs: int) -> dict[int, Path]:
    """Compile all kernels, `jobs` files at a time; return the library of each architecture."""
    texts = read_sources()
    kernels = sorted((name for name in texts if name.endswith(".cu")), key=lambda name: -len(texts[name]))
    units = [*kernels, *MACHINE]  # the slowest first
    with ThreadPoolExecutor(jobs) as pool:
        compiled = {a: [pool.submit(compile_unit, folder, a, name, texts) for name in units] for a in architectures}
        return {a: link(folder, a, [future.result() for future in futures]) for a, futures in compiled.items()}


def build_changed(folder: Path, architecture: int, unit: str, texts: Texts) -> Path:
    """Compile one kernel file from changed sources, and link it with the unchanged rest."""
    original = read_sources()
    others = [name for name in original if name.endswith(".cu") and name != unit]
    # First on the command line: of functions in headers, which every object has, the linker takes the first one.
    objects = [compile_unit(folder, architecture, unit, texts)]
    objects += [compile_unit(folder, architecture, name, original) for name in (*others, *MACHINE)]
    return link(folder, architecture, objects)


def compile_unit(folder: Path, architecture: int, unit: str, texts: Texts) -> Path:
    """Compile a .cu file or one of MACHINE, which is not checked itself, with the headers as they are in `texts`."""
    texts = {name: text for name, text in texts.items() if name == unit or not name.endswith(".cu")}
    flags = [*FLAGS, *(CHECKS if unit in texts else []), *(["-mfma"] if _has_fma() else [])]
    flags.append(f"-D__CUDA_ARCH__={architecture}")
    digest = hashlib.sha256(repr((flags, unit, sorted(texts.items()))).encode())
    for path in sorted(path for path in HERE.rglob("*") if path.suffix in (".cpp", ".h", ".py")):
        if path.name in (unit, "rewrite.py") or path.suffix == ".h":
            digest.update(path.read_bytes())
    name = f"{Path(unit).stem}_{architecture}_{digest.hexdigest()[:16]}"
    target = folder / f"{name}.o"
    if target.exists():
        return target
    tree = folder / name
    for path_in_root, text in texts.items():
        written = tree / (f"{path_in_root}.cpp" if path_in_root == unit else path_in_root)
        written.parent.mkdir(parents=True, exist_ok=True)
        written.write_text(rewrite.rewrite(text, path_in_root))
    source = tree / f"{unit}.cpp" if unit in texts else HERE / unit
    includes = [f"-I{HERE / 'include'}", f"-I{tree / 'csrc' / 'cuda'}"]
    _run(["g++", *flags, *includes, "-c", str(source)], target)
    return target


def link(folder: Path, architecture: int, objects: list[Path]) -> Path:
    """Link a library that knows all of its symbols; the first of several equal ones counts."""
    digest = hashlib.sha256("\0".join(path.name for path in objects).encode()).hexdigest()[:16]
    target = folder / f"emulated_{architecture}_{digest}.so"
    if not target.exists():
        _run(["g++", "-shared", "-Wl,-z,defs", *map(str, objects), "-ldl"], target)
    return target


def _run(command: list[str], target: Path) -> None:
    """Run a compiler; its output is there whole or not at all."""
    unfinished = target.with_name(f"{target.name}.{os.getpid()}")
    subprocess.run([*command, "-o", str(unfinished)], check=True)
    unfinished.replace(target)


def _has_fma() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "fma" in cpuinfo.read_text().split()
