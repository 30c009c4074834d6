"""``palu doctor``, and the option ``--device``."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from helpers.command import Commands, done, palu_command, read, refusal

import palu
from palu import ops


def test_doctor() -> None:
    result = done("doctor")
    assert ops.extension_path() in result.stdout
    assert f"torch {torch.__version__}" in result.stdout
    assert "All passed." in result.stdout
    for op in ("prefix_mask", "topk_mse, global_mean", "linear_topk_mse, local_mean", "cross_entropy_", "kl_div_, rev"):
        for device in ["cpu", "cuda:0"][: 1 + torch.cuda.is_available()]:
            for dtype in ("float32", "float64"):
                assert re.search(rf"^ok +{op}\w* +{device} +{dtype} ", result.stdout, re.MULTILINE), (op, device, dtype)


def spoil(good: Callable[..., Any]) -> Callable[..., Any]:
    def spoilt(*args: Any) -> Any:
        return good(*args) * 1.001

    return spoilt


def test_an_op_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "topk_mse", spoil(ops.topk_mse))
    result = palu_command("doctor")
    assert result.exit_code == 1
    failed = [line for line in result.stdout.splitlines() if line.startswith("FAILED")]
    assert len(failed) == 8, failed
    assert all(" topk_mse" in line for line in failed)
    assert "8 failed" in result.stdout


def test_an_op_that_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any) -> None:
        raise NotImplementedError("no kernel for this device\nand more")

    monkeypatch.setattr(ops, "prefix_mask", missing)
    result = palu_command("doctor")
    assert result.exit_code == 1
    assert result.stdout.count("NotImplementedError: no kernel for this device\n") == 2


def test_no_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a build needs is told, and what of it is here."""
    monkeypatch.delattr(palu, "ops")
    monkeypatch.setitem(sys.modules, "palu.ops", None)
    result = palu_command("doctor")
    assert result.exit_code == 1
    assert re.search(r"C\+\+ compiler \(.*\): \S", result.stdout)
    assert "ninja: " in result.stdout


# --- --device ---
@pytest.fixture
def running(folder: Path, commands: Commands, tofu: list[Any], out: Path) -> Commands:
    """The commands that run a model."""
    more = {
        "unlearn": ["--epochs", 1],
        "inspect": ["--forget", folder / "unmarked.jsonl", "--annotate", "contrast"],
        "eval": [*tofu[1:], "--output", out],
        "audit": [],
    }
    return {name: commands[name] + options for name, options in more.items()}


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """accelerate would choose a device on which nothing can be computed."""
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "meta")
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("name", ["unlearn", "inspect", "eval", "audit"])
def test_the_device_can_be_given(name: str, running: Commands, out: Path) -> None:
    assert palu_command(*running[name]).exit_code != 0
    shutil.rmtree(out, ignore_errors=True)
    AcceleratorState._reset_state(True)
    done(*running[name], "--device", "cpu")
    if name == "unlearn":
        assert read(out / "private" / "summary.json")["device"] == "cpu"


@pytest.mark.usefixtures("elsewhere")
def test_doctor_tells_the_device() -> None:
    assert "\nruns use meta, as accelerate chooses; --device names another one\n" in palu_command("doctor").stdout


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "cpu:1"])
def test_a_device_that_is_not_there(device: str, running: Commands) -> None:
    for command in running.values():
        said = refusal(palu_command(*command, "--device", device))
        assert said.startswith(f"--device {device}: torch has no such device here; give one of cpu")


def test_a_device_that_nothing_asks_for(commands: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    told = "--device was given without --annotate, which may run a model; leave it out"
    assert refusal(palu_command(*commands["inspect"], "--device", "cpu")) == told
    monkeypatch.setenv("WORLD_SIZE", "2")
    told = "--device cpu: the launcher gives each process its device; leave it out"
    assert refusal(palu_command(*commands["unlearn"], "--device", "cpu")) == told
