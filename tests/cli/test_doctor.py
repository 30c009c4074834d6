"""``palu doctor``, and the option ``--device``."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from helpers.command import Commands, done, palu_command, read, refusal

import palu
from palu import ops


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """accelerate would choose a device on which nothing can be computed."""
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "meta")
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.mark.usefixtures("elsewhere")
def test_doctor() -> None:
    result = done("doctor")
    assert ops.extension_path() in result.stdout
    assert f"torch {torch.__version__}" in result.stdout
    assert "All passed." in result.stdout
    losses = ("topk_mse, global_mean", "linear_topk_mse, local_mean", "cross_entropy_", "kl_div_, rev")
    dtypes = dict.fromkeys(losses, ("float64", "float32", "bfloat16"))
    dtypes |= {"prefix_mask": ("int64",), "adamw_": ("float32", "bfloat16")}
    for op, of_op in dtypes.items():
        for device in ["cpu", "cuda:0"][: 1 + torch.cuda.is_available()]:
            for dtype in of_op:
                assert re.search(rf"^ok +{op}\w* +{device} +{dtype} ", result.stdout, re.MULTILINE), (op, device, dtype)
    assert "\nruns use meta, as accelerate chooses; --device names another one\n" in result.stdout


def test_ops_that_are_wrong_or_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    good, adamw_ = ops.topk_mse, ops.adamw_

    def missing(*_: Any) -> None:
        raise NotImplementedError("no kernel for this device\nand more")

    def without_low_bits(*args: Any) -> None:
        adamw_(*args)
        if args[4] is not None:
            args[4].zero_()

    monkeypatch.setattr(ops, "topk_mse", lambda *args: good(*args) * 1.001)
    monkeypatch.setattr(ops, "adamw_", without_low_bits)
    monkeypatch.setattr(ops, "prefix_mask", missing)
    result = palu_command("doctor")
    assert result.exit_code == 1
    failed = [line for line in result.stdout.splitlines() if line.startswith("FAILED")]
    assert [" topk_mse" in line for line in failed].count(True) == 12, failed
    raised = [line for line in failed if " prefix_mask" in line]
    assert [line.split()[3] for line in failed if " adamw_" in line] == ["bfloat16"]
    assert len(failed) == 13 + len(raised) and f"{len(failed)} failed" in result.stdout
    assert result.stdout.count("NotImplementedError: no kernel for this device\n") == len(raised) == 1


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


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("name", ["unlearn", "inspect", "eval", "audit"])
def test_the_device_can_be_given(name: str, running: Commands, out: Path) -> None:
    assert palu_command(*running[name]).exit_code != 0
    shutil.rmtree(out, ignore_errors=True)
    AcceleratorState._reset_state(True)
    done(*running[name], "--device", "cpu")
    if name == "unlearn":
        assert read(out / "private" / "summary.json")["device"] == "cpu"


def test_the_launcher_gives_devices(commands: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    told = "--device cpu: the launcher gives each process its device; leave it out"
    assert refusal(palu_command(*commands["unlearn"], "--device", "cpu")) == told
