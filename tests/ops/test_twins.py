"""Devices without native kernels are served by the twins: here the CPU, in processes whose extension has no kernels."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.runs import LOSSES, unlearn
from helpers.tiny import tiny_llama

from palu.ops import selftest
from palu.ops.functional import use_gather
from palu.ops.library import NATIVE_DEVICES, no_native_kernels

OPS = ["prefix_mask", "topk_mse", "topk_backward"]
OPS += [f"linear_{name}" for name in ("topk_mse", "topk_unlikelihood", "topk_backward")]
CUDA_ALONE = ["cross_entropy_", "kl_div_", "adamw_"]
TWIN_ALONE = ["topk_unlikelihood"]
ROOT = Path(__file__).resolve().parents[2]
WARNING = "RuntimeWarning: palu has no native kernels for cpu devices: plain PyTorch stands in there, which is slower"
# In a process of its own: no other one can load an extension with the same schemas.
BUILD = """
import sys
from torch.utils import cpp_extension
from palu import _build
_build.prepare_environment()
cpp_extension.load("_C", [str(_build.CSRC / "ops.cpp")], build_directory=sys.argv[1], extra_cflags=["-O0"])
"""
RUN = """
import sys, torch, palu
from helpers.runs import unlearn
from helpers.tiny import tiny_llama
from palu.ops.library import NATIVE_DEVICES
assert not NATIVE_DEVICES
runs = [unlearn(tiny_llama(dtype=torch.float64), kl_direction=direction) for direction in ("reverse", "forward")]
torch.save([(run.history, run.model.state_dict()) for run in runs], sys.argv[1])
palu.linear_topk_mse(torch.ones(2, 3), torch.ones(6, 3), torch.tensor([[0, 1], [2, 6]]), impl="gather")
"""


@pytest.fixture(scope="session")
def no_kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a palu whose prebuilt extension registers the ops' schemas and nothing else."""
    folder = tmp_path_factory.mktemp("no_kernels")
    for name in ("palu", "csrc"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("_C*", "__pycache__"))
    result = run(folder, "-c", BUILD, str(folder / "palu"))
    assert result.returncode == 0, result.stderr
    return folder


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(folder), str(ROOT / "tests")])
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )


def test_the_tests_of_the_ops_pass_on_twins(no_kernels: Path) -> None:
    """Values, gradients, strides, messages and opcheck, through the dispatcher."""
    options = ["-q", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), "-p", "no:cacheprovider"]
    # A twin's memory is that of all logits; what torch.compile asks of an op, opcheck asks.
    options += ["-k", "not allocates_under_a_tenth and not fullgraph", str(ROOT / "tests" / "ops" / "test_ops.py")]
    result = run(no_kernels, "-m", "pytest", *options)
    assert result.returncode == 0, result.stdout
    assert result.stdout.count(WARNING) == 1, result.stdout


def test_a_run_on_twins_is_a_run_on_native_kernels(no_kernels: Path, tmp_path: Path) -> None:
    """And a gather names the index that is out of range."""
    file = tmp_path / "run.pt"
    result = run(no_kernels, "-c", RUN, str(file))
    told = "IndexError: palu::linear_topk_mse: index[1, 1] = 6 is out of range for a vocabulary of 6"
    assert result.stderr.rstrip().endswith(told), result.stderr
    assert result.stderr.count(WARNING) == 1
    for direction, (history, weights) in zip(("reverse", "forward"), torch.load(file), strict=True):
        native = unlearn(tiny_llama(dtype=torch.float64), kl_direction=direction)
        for theirs, ours in zip(history, native.history, strict=True):
            for name in LOSSES:
                assert theirs[name] == pytest.approx(ours[name], rel=1e-6, abs=1e-9), name
        for name, weight in native.model.state_dict().items():
            torch.testing.assert_close(weights[name], weight.cpu(), rtol=1e-9, atol=1e-9)


def test_doctor_says_what_serves(no_kernels: Path) -> None:
    result = run(no_kernels, "-m", "palu", "doctor")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "kernels on cpu: palu has no native kernels for cpu devices: plain PyTorch stands in there" in result.stdout
    assert "All passed." in result.stdout


def test_doctor_on_a_device_without_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest, "_can_compute", lambda _, dtype: dtype != torch.float64)
    checks = list(selftest.check_ops(torch.device("cpu")))
    assert all(check.passed for check in checks)
    assert {check.dtype for check in checks} == {"float32", "bfloat16", "int64"}


def test_native_kernels_come_first() -> None:
    """A twin is registered beside them, for all devices at once."""
    for op in OPS + CUDA_ALONE + TWIN_ALONE:
        native = {"CPU": op in OPS, "CUDA": op not in TWIN_ALONE and "cuda" in NATIVE_DEVICES}
        table = torch._C._dispatch_dump_table(f"palu::{op}").splitlines()
        found = {line.partition(":")[0]: line for line in table}
        for key in ("CPU", "CUDA", "MPS", "XPU", "PrivateUse1"):
            assert ("csrc" if native.get(key) else "twins.py") in found[key], (op, table)


def test_no_gather_without_a_native_one() -> None:
    index, weight = torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1000, 1)
    assert use_gather("auto", index, weight)
    assert not use_gather("auto", index.to("meta"), weight.to("meta"))
    assert use_gather("gather", index.to("meta"), weight.to("meta"))


def test_the_mend_of_a_cuda_build_without_nvcc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "Install the CUDA toolkit 13.0" in no_native_kernels("cuda")
    assert "no native kernels for mps devices" in no_native_kernels("mps")
    monkeypatch.setattr(torch.version, "cuda", None)  # ROCm
    assert "no native kernels for cuda devices" in no_native_kernels("cuda")
