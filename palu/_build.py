"""List the sources and flags of every build of the extension, and build it just in time.

`setup.py` builds the prebuilt module `palu._C` from it, CMake reads what it prints as a script, and `palu.ops` compiles
from it just in time where no prebuilt module is installed.
"""

import hashlib
import logging
import os
import re
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_PACKAGE = Path(__file__).resolve().parent
# Installed, the sources lie inside the package; in a checkout, beside it.
CSRC = _PACKAGE / "csrc" if (_PACKAGE / "csrc").is_dir() else _PACKAGE.parent / "csrc"

# No -std: torch passes the standard that its own headers need. Without -fopenmp,
# at::parallel_for silently runs on one thread. -g0: Python's own flags may ask for debug symbols, most of the binary.
CXX_FLAGS = ["-O3", "-g0", "-fopenmp"]
NVCC_FLAGS = ["-O3"]
LINK_FLAGS = ["-fopenmp"]
# Set by `make sanitize`: the CPU kernels with AddressSanitizer, UBSan and the standard library's assertions.
# Such a build loads only into a process that has the sanitizer's runtime preloaded.
SANITIZED = os.environ.get("PALU_SANITIZE") == "1"
if SANITIZED:
    _SANITIZERS = "-fsanitize=address,undefined"
    CXX_FLAGS = ["-O1", "-g", "-fno-omit-frame-pointer", _SANITIZERS, "-D_GLIBCXX_ASSERTIONS", "-fopenmp"]
    LINK_FLAGS = [_SANITIZERS, "-fopenmp"]
_PATIENCE = 10  # seconds to wait for another process without a word
DEFAULT_CUDA_ARCHITECTURES = "8.0;9.0+PTX"

_logger = logging.getLogger(__name__)


def with_cuda() -> bool:
    """Whether the CUDA kernels are built: torch is a CUDA build, and nvcc exists; builders of wheels have no GPU."""
    if SANITIZED:
        return False
    import torch
    from torch.utils import cpp_extension

    home = cpp_extension.CUDA_HOME
    return torch.version.cuda is not None and home is not None and Path(home, "bin", "nvcc").exists()


def torch_release() -> str:
    """Return the release of torch that is installed, such as "2.13": within it, an extension goes on working."""
    import torch

    return ".".join(torch.__version__.split(".")[:2])


def torch_tag() -> str:
    """Name the torch and the kernels of a build, such as "torch2.13cpu" or "torch2.13cu130"."""
    import torch

    return f"torch{torch_release()}" + (f"cu{torch.version.cuda}".replace(".", "") if with_cuda() else "cpu")


def check_built_for(module: Path) -> None:
    """Raise ImportError where a prebuilt module is for another torch, which it names (`csrc/ops.cpp`).

    It might load all the same: torch 2.13 loads a build for 2.12, and takes its CPU kernels for CUDA's.
    """
    named = re.search(rb"palu was built for torch ([0-9.]+)\0", module.read_bytes())
    built_for = named[1].decode() if named else "an unknown version"
    if built_for != torch_release():
        raise ImportError(f"{module} is for torch {built_for}, and torch {torch_release()} is here")


def sources() -> list[str]:
    """Return the paths of the files to compile."""
    return _files("*.cpp", "*.cu")


def headers() -> list[str]:
    """Return the paths of the headers; a build that depends on them notices when one changes."""
    return _files("*.h", "*.cuh")


def _files(*patterns: str) -> list[str]:
    folders = [CSRC, CSRC / "cpu", *([CSRC / "cuda"] if with_cuda() else [])]
    found = [path for folder in folders for pattern in patterns for path in folder.glob(pattern)]
    return [str(path) for path in sorted(found)]


def prepare_environment(architectures: str = DEFAULT_CUDA_ARCHITECTURES) -> None:
    """Set what torch's build tools read from the environment, where the user has not."""
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", architectures)
    if shutil.which("ninja") is None:
        # The ninja package puts its binary beside the interpreter, which need not be on PATH.
        try:
            import ninja
        except ImportError as error:
            raise RuntimeError("ninja is not installed; pip install ninja") from error
        os.environ["PATH"] = os.pathsep.join([ninja.BIN_DIR, os.environ.get("PATH", "")])


def visible_architectures() -> str:
    """Return the architectures of the GPUs that are visible, such as "7.5"; those of every build where none is."""
    import torch

    if not torch.cuda.is_available():
        return DEFAULT_CUDA_ARCHITECTURES
    found = {torch.cuda.get_device_capability(number) for number in range(torch.cuda.device_count())}
    return ";".join(f"{major}.{minor}" for major, minor in sorted(found))


def jit_name() -> str:
    """Name the extension compiled just in time: one per torch version, architectures, sanitizer, place and sources."""
    import torch

    digest = hashlib.sha256(bytes(CSRC.resolve()))  # ninja would rebuild one checkout's for another's
    for path in [*headers(), *sources()]:
        digest.update(Path(path).name.encode() + b"\0" + Path(path).read_bytes() + b"\0")
    version = re.sub(r"\W", "_", torch.__version__.partition("+")[0])
    device = "cpu"
    if with_cuda() and torch.version.cuda:
        listed = os.environ.get("TORCH_CUDA_ARCH_LIST", visible_architectures())
        device = re.sub(r"\W+", "_", f"cu{torch.version.cuda}_sm{listed}".replace(".", ""))
    if SANITIZED:
        device += "_sanitized"
    return f"palu_torch{version}_{device}_{digest.hexdigest()[:10]}"


def jit() -> str:
    """Compile the extension, unless an earlier process has, load it and return its path.

    Processes that start together wait for the first: the lock is the operating system's, so a killed
    build leaves none behind, and no process waits for one that never imports palu.
    """
    from torch.utils import cpp_extension

    compiler = cpp_extension.get_cxx_compiler()
    if shutil.which(compiler) is None:
        raise RuntimeError(f"no C++ compiler: {compiler!r} is not on PATH (CXX names another: a command, no arguments)")
    prepare_environment(visible_architectures())
    name = jit_name()
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()
    directory = Path(root, f"py{sys.version_info.major}{sys.version_info.minor}", name)
    with _locked(directory / "palu.lock"):
        # torch's own lock is a plain file; ours is held, so one that is there was left by a killed build.
        (directory / "lock").unlink(missing_ok=True)
        if not (directory / f"{name}.so").exists():
            _logger.warning("palu: compiling the native ops into %s (once, about a minute)", directory)
        module: Any = cpp_extension.load(
            name,
            sources(),
            extra_cflags=CXX_FLAGS,
            extra_cuda_cflags=NVCC_FLAGS,
            extra_ldflags=LINK_FLAGS,
            build_directory=str(directory),
        )
    return str(module.__file__)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock within the block, in a folder that is made; say what is waited for if that takes long."""
    import filelock

    lock = filelock.FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=_PATIENCE)
        except filelock.Timeout:
            _logger.warning("palu: another process compiles the native ops and holds %s; waiting for it to end", path)
            lock.acquire()
    except (OSError, NotImplementedError) as error:  # the latter where a network's file system has no locks
        raise RuntimeError(f"no folder to compile in ({error}); TORCH_EXTENSIONS_DIR names another one") from error
    try:
        yield
    finally:
        lock.release()


def cxx_standard() -> str:
    """Return the C++ standard that torch's build tools pass, such as "20"."""
    from torch.utils import cpp_extension

    found = re.search(r"-std=c\+\+(\d+)", Path(cpp_extension.__file__).read_text())
    if found is None:
        raise RuntimeError("torch.utils.cpp_extension names no C++ standard")
    return found[1]


def cmake_settings() -> str:
    """Write the `set(...)` commands that give CMakeLists.txt the sources and flags."""
    from torch.utils import cpp_extension

    device = "cuda" if with_cuda() else "cpu"
    libraries = ["c10", "torch", "torch_cpu", "torch_python"]
    if with_cuda():
        libraries += ["c10_cuda", "torch_cuda", "cudart"]
    settings = {
        "PALU_SOURCES": sources(),
        "PALU_INCLUDE_DIRS": [*cpp_extension.include_paths(device), sysconfig.get_paths()["include"]],
        "PALU_LIBRARY_DIRS": cpp_extension.library_paths(device),
        "PALU_LIBRARIES": libraries,
        "PALU_CXX_FLAGS": CXX_FLAGS,
        "PALU_NVCC_FLAGS": NVCC_FLAGS,
        "PALU_LINK_FLAGS": LINK_FLAGS,
        "PALU_CXX_STANDARD": [cxx_standard()],
        "PALU_WITH_CUDA": ["ON" if with_cuda() else "OFF"],
        "PALU_CUDA_ARCHITECTURES": _cmake_architectures(),
        "PALU_SUFFIX": [sysconfig.get_config_var("EXT_SUFFIX")],
    }
    return "\n".join(
        f"set({name} {' '.join(f'[==[{value}]==]' for value in values)})" for name, values in settings.items()
    )


def _cmake_architectures() -> list[str]:
    # "9.0+PTX" is CMake's "90" (machine code and PTX), "8.0" its "80-real".
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", DEFAULT_CUDA_ARCHITECTURES)
    numbers = listed.replace(" ", ";").replace(".", "").split(";")
    return [n.removesuffix("+PTX") if n.endswith("+PTX") else f"{n}-real" for n in numbers]


if __name__ == "__main__":
    print(cmake_settings())
