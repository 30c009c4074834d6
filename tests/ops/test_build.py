"""Every way to get the extension: wheel, CMake, just in time; and the one error when there is none.

`make wheels` builds and tries a wheel for each torch, with all that the wheel requires.
"""

import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import ninja
import pytest
import torch

from palu import _build

ROOT = Path(__file__).resolve().parents[2]
# Prints which file is loaded, and uses an op.
USE = """
import torch, palu
from palu import ops
assert palu.prefix_mask(torch.tensor([[1, 1, -1]]), 1).tolist() == [[True, False, False]]
print(ops.extension_path())
"""


def environment(**changes: str) -> dict[str, str]:
    """Without what would make the checkout importable, or name another folder for caches than HOME."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "XDG_CACHE_HOME")}
    return kept | {"PATH": os.pathsep.join([ninja.BIN_DIR, os.environ["PATH"]])} | changes


def start(folder: Path, script: str = USE, *, group: bool = False, **changes: str) -> subprocess.Popen[str]:
    """Run a script with `folder` first on the path; in a group of its own, which can be killed."""
    return subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=folder,
        env=environment(PYTHONPATH=str(folder), **changes),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=group,
    )


def run(folder: Path, script: str = USE, *, works: bool = True, **changes: str) -> tuple[str, str]:
    """What the script said on stdout and stderr. It must work, or fail; and not hang."""
    process = start(folder, script, **changes)
    try:
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
    assert (process.returncode == 0) == works, err
    return out.strip(), err


def no_ops(folder: Path, script: str = "import palu.ops", **changes: str) -> str:
    """The one error where the ops cannot be had."""
    _, err = run(folder, script, works=False, **changes)
    error = err[err.index("ImportError: palu's native ops are not available.") :]
    assert "Install a C++ compiler" in error
    return error


# Builds a module that takes a second to compile, in the way of the real one.
BUILD = """
from palu import _build
_build.sources = lambda: ["{source}"]
print(_build.jit())
"""


@pytest.fixture
def build(tmp_path: Path) -> str:
    """The script of a small build, to be run with the checkout on the path."""
    source = tmp_path / "small.cpp"
    source.write_text("""
#include <Python.h>
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "small", nullptr, -1};
#define INIT(name) INIT_OF(name)
#define INIT_OF(name) PyInit_##name
PyMODINIT_FUNC INIT(TORCH_EXTENSION_NAME)() { return PyModule_Create(&module); }
""")
    return BUILD.format(source=source)


def copy_without_prebuilt(package: Path, folder: Path) -> Path:
    shutil.copytree(package, folder / "palu", ignore=shutil.ignore_patterns("_C*", "__pycache__"))
    return folder


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with this one's torch, and the wheel that pip makes of the checkout's source distribution."""
    source, dist, fresh = (tmp_path_factory.mktemp(name) for name in ("source", "dist", "fresh"))
    copy_without_prebuilt(ROOT / "palu", source)
    shutil.copytree(ROOT / "csrc", source / "csrc")
    for file in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    command = [sys.executable, "setup.py", "-q", "sdist", "--dist-dir", str(dist)]
    subprocess.run(command, cwd=source, env=environment(), check=True)
    (sdist,) = dist.glob("palu_unlearn-*.tar.gz")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(dist)]
    subprocess.run([*command, str(sdist)], env=environment(), check=True)
    (wheel,) = dist.glob("palu_unlearn-*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(fresh)], check=True)
    # Of a folder that a .pth file names, .pth files are not read: an editable palu there stays out.
    (packages(fresh) / "torch.pth").write_text(f"{sysconfig.get_paths()['purelib']}\n")
    command = [sys.executable, "-m", "pip", "--python", str(fresh), "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(command, env=environment(), check=True)
    return fresh


def packages(venv: Path) -> Path:
    return Path(sysconfig.get_paths(vars={"base": str(venv), "platbase": str(venv)})["purelib"])


@pytest.fixture(scope="session")
def without_prebuilt(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_without_prebuilt(packages(installed) / "palu", tmp_path_factory.mktemp("without_prebuilt"))


def test_pip_install(installed: Path, tmp_path: Path) -> None:
    """It names its torch, and serves without a compiler: nothing is on PATH."""
    package = packages(installed) / "palu"
    (wheel,) = importlib.metadata.distributions(path=[str(package.parent)], name="palu-unlearn")
    assert wheel.version.endswith(f"+{_build.torch_tag()}")
    assert [name for name in wheel.requires or [] if name.startswith("torch")] == [f"torch=={_build.torch_release()}.*"]
    for source in (ROOT / "csrc").rglob("*.*"):
        assert (package / "csrc" / source.relative_to(ROOT / "csrc")).is_file()
    assert (package / "py.typed").is_file()
    bare = environment(PATH=str(tmp_path), CXX="/nonexistent", TORCH_EXTENSIONS_DIR=str(tmp_path))
    options: dict[str, Any] = {"cwd": tmp_path, "env": bare, "capture_output": True, "text": True}
    used = subprocess.run([installed / "bin" / "python", "-c", USE], **options)
    assert used.returncode == 0, used.stderr
    path = Path(used.stdout.strip())
    assert path.parent == package and path.name.startswith("_C.")
    doctor = subprocess.run([installed / "bin" / "palu", "doctor"], **options)
    assert doctor.returncode == 0, doctor.stdout + doctor.stderr
    assert "native ops: prebuilt" in doctor.stdout and "All passed." in doctor.stdout
    assert "kernels on cpu: native" in doctor.stdout
    assert not any(tmp_path.iterdir())


def test_jit_of_an_installed_package(build: str, without_prebuilt: Path, tmp_path: Path) -> None:
    """Processes that start together share one build, and later ones reuse it; the sources are the package's own."""
    together = [start(without_prebuilt, build, TORCH_EXTENSIONS_DIR=str(tmp_path)) for _ in range(2)]
    outputs = [process.communicate() for process in together]
    assert all(process.returncode == 0 for process in together), outputs
    paths = {out.strip() for out, _ in outputs}
    assert sum("compiling" in err for _, err in outputs) == 1
    path = Path(paths.pop())
    assert not paths and path.is_relative_to(tmp_path)
    assert torch.__version__.partition("+")[0].replace(".", "_") in path.stem
    assert ("cu" if _build.with_cuda() else "_cpu_") in path.stem

    built = path.stat().st_mtime_ns
    again, stderr = run(without_prebuilt, build, TORCH_EXTENSIONS_DIR=str(tmp_path))
    assert again == str(path) and path.stat().st_mtime_ns == built and "compiling" not in stderr

    sources, _ = run(without_prebuilt, "from palu import _build; print(*_build.sources(), sep='\\n')")
    csrc = without_prebuilt / "palu" / "csrc"
    assert {Path(name).relative_to(csrc) for name in sources.splitlines()} == {
        Path(name).relative_to(_build.CSRC) for name in _build.sources()
    }


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"not ours", "_C.so is for torch an unknown version, and torch {here} is here"),
        # Not even loaded: it might load, and crash.
        (b"palu was built for torch 2.0\0", "_C.so is for torch 2.0, and torch {here} is here"),
        (b"palu was built for torch {here}\0", "file too short"),
    ],
    ids=["unknown", "another torch", "broken"],
)
def test_prebuilt_that_does_not_load(without_prebuilt: Path, tmp_path: Path, content: bytes, told: str) -> None:
    """It is said why the prebuilt module is not used, and a build just in time is tried."""
    here = _build.torch_release()
    module = without_prebuilt / "palu" / "_C.so"
    module.write_bytes(content.replace(b"{here}", here.encode()))
    try:
        error = no_ops(without_prebuilt, TORCH_EXTENSIONS_DIR=str(tmp_path), CXX="no-such-c++")
    finally:
        module.unlink()
    (prebuilt,) = (line for line in error.splitlines() if line.startswith("  prebuilt: "))
    assert "palu._C does not load, most likely because it was built for another torch: " in prebuilt
    assert told.format(here=here) in prebuilt
    assert "just in time: no C++ compiler: 'no-such-c++'" in error


def test_neither_prebuilt_nor_compiler(without_prebuilt: Path, tmp_path: Path) -> None:
    error = no_ops(without_prebuilt, TORCH_EXTENSIONS_DIR=str(tmp_path), PATH=str(tmp_path), CXX="no-such-c++")
    assert "prebuilt: no module palu._C is installed" in error
    told = "no C++ compiler: 'no-such-c++' is not on PATH (CXX names another: a command, no arguments)"
    assert f"just in time: {told}" in error


def test_a_wait_for_another_build_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is stopped, say, and would hold the lock for ever; one that is killed leaves none."""
    path = tmp_path / "palu.lock"
    hold = "import filelock, sys; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print(flush=True); input()"
    other = subprocess.Popen([sys.executable, "-c", hold, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdin is not None and other.stdout is not None
    other.stdout.readline()
    monkeypatch.setattr(_build, "_PATIENCE", 0.1)
    said: list[tuple[str, Path]] = []

    def warning(words: str, where: Path) -> None:
        said.append((words, where))
        other.kill()

    monkeypatch.setattr(_build._logger, "warning", warning)
    for _ in range(2):  # the second time nobody holds it
        with _build._locked(path):
            pass
    ((words, where),) = said
    assert "another process compiles the native ops" in words and where == path
    other.communicate()


@pytest.mark.parametrize("variable", ["TORCH_EXTENSIONS_DIR", "HOME", "XDG_CACHE_HOME"])
def test_a_folder_that_cannot_be_made_is_named(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for other in ("TORCH_EXTENSIONS_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(variable, "/proc")  # where nobody, root included, may write
    with pytest.raises(RuntimeError, match=r"no folder to compile in \(.*/proc.*TORCH_EXTENSIONS_DIR names another"):
        _build.jit()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    told = r"no folder to compile in \(.*palu.lock.*TORCH_EXTENSIONS_DIR names another"
    (tmp_path / "palu.lock").mkdir()
    with pytest.raises(RuntimeError, match=told), _build._locked(tmp_path / "palu.lock"):
        pass


def test_a_killed_build_is_taken_up(build: str, tmp_path: Path) -> None:
    """With every process of it, as the kernel or a cluster's scheduler kills a job."""
    begun, slow = tmp_path / "begun", tmp_path / "slow-c++"
    slow.write_text(f'#!/bin/sh\ncase "$*" in *small.cpp*) touch {begun}; sleep 100;; esac\nexec c++ "$@"\n')
    slow.chmod(0o755)
    builds = str(tmp_path / "builds")
    killed = start(ROOT, build, group=True, TORCH_EXTENSIONS_DIR=builds, CXX=str(slow))
    deadline = time.monotonic() + 100
    while not begun.exists():
        assert killed.poll() is None and time.monotonic() < deadline, killed.communicate()
        time.sleep(0.05)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert list(Path(builds).rglob("lock")), "torch's own lock, which nobody holds any more"
    _, stderr = run(ROOT, build, TORCH_EXTENSIONS_DIR=builds)
    assert "compiling" in stderr and "waiting" not in stderr


def test_a_compiler_that_does_not_work(tmp_path: Path) -> None:
    broken = tmp_path / "broken-c++"
    broken.write_text('#!/bin/sh\necho "broken: cannot compile" >&2\n[ "$1" = -v ] || exit 1\n')
    broken.chmod(0o755)
    assert "broken: cannot compile" in no_ops(ROOT, TORCH_EXTENSIONS_DIR=str(tmp_path / "builds"), CXX=str(broken))


@pytest.mark.skipif(shutil.which("clang++") is None, reason="clang is not installed")
def test_clang(tmp_path: Path) -> None:
    run(ROOT, TORCH_EXTENSIONS_DIR=str(tmp_path), CXX="clang++")


def test_ninja_that_is_not_on_the_path(build: str, tmp_path: Path) -> None:
    """The package's own is found; with neither, one error says so."""
    for tool in ("c++", "as", "ld", "sh", "uname", "which"):
        if (found := shutil.which(tool)) is not None:
            (tmp_path / tool).symlink_to(found)
    places = {"PATH": str(tmp_path), "TORCH_EXTENSIONS_DIR": str(tmp_path / "builds")}
    run(ROOT, build, **places)
    without = "import sys; sys.modules['ninja'] = None\nimport palu.ops"
    assert "just in time: ninja is not installed; pip install ninja" in no_ops(ROOT, without, **places)


@pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not installed")
def test_cmake(tmp_path: Path) -> None:
    # Kept between runs: CMake's own dependency tracking decides what to compile again.
    build = ROOT / "build" / "test-cmake"
    package = copy_without_prebuilt(ROOT / "palu", tmp_path) / "palu"
    configure = ["cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(build)]
    configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-DPALU_OUTPUT_DIRECTORY={package}"]
    subprocess.run(configure, env=environment(), check=True)
    subprocess.run(["cmake", "--build", str(build)], env=environment(), check=True)
    commands = {entry["file"]: entry["command"] for entry in json.loads((build / "compile_commands.json").read_text())}
    assert set(commands) == set(_build.sources())
    assert all("-fopenmp" in command for file, command in commands.items() if file.endswith(".cpp"))
    path, _ = run(tmp_path)
    assert Path(path).parent == package


def test_cuda_is_built_without_a_visible_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from torch.utils import cpp_extension

    def visible() -> bool:
        raise AssertionError("builders have no GPU")

    monkeypatch.setattr(torch.cuda, "is_available", visible)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path))
    assert not _build.with_cuda()  # no nvcc: CPU only
    assert not any("cuda" in source for source in _build.sources())
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").touch()
    assert _build.with_cuda()
    assert any(source.endswith(".cu") for source in _build.sources())
    # A wheel is for many machines, what is compiled just in time for the GPUs that are here.
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "_cu130_sm80_90_PTX_" in _build.jit_name()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_capability", [(9, 0), (7, 5), (9, 0)].__getitem__)
    assert _build.visible_architectures() == "7.5;9.0" and "_cu130_sm75_90_" in _build.jit_name()
    monkeypatch.setattr(torch.version, "cuda", None)
    assert not _build.with_cuda()


def test_sanitized_build_is_one_of_its_own() -> None:
    script = "from palu import _build; print(_build.jit_name(), *_build.CXX_FLAGS, *_build.LINK_FLAGS)"
    out, _ = run(ROOT, script, PALU_SANITIZE="1")
    assert "_cpu_sanitized_" in out and out.count("-fsanitize=address,undefined") == 2
    assert "sanitize" not in _build.jit_name() and not any("sanitize" in flag for flag in _build.CXX_FLAGS)
