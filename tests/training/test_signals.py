"""Ctrl-C and SIGTERM within a run: the step ends, and a checkpoint is written."""

import signal
from pathlib import Path
from typing import Any

import pytest
from helpers.scenarios import ON_CPU, SCENARIOS, STEPS, assert_same, kept, loop_result, step
from helpers.tiny import tiny_llama

from palu.methods.palu import PaluMethod
from palu.ref_model import precompute
from palu.training import checkpoint

pytestmark = [ON_CPU, pytest.mark.usefixtures("in_the_foreground")]
unlearn = SCENARIOS["tied"].loop


def pressing(monkeypatch: pytest.MonkeyPatch, *calls: int, number: int = signal.SIGINT) -> None:
    """Press Ctrl-C, or send another signal, in the middle of these forward passes, counted from 1."""
    forward, count = PaluMethod.batch_losses, 0

    def pressed(self: PaluMethod, *args: Any) -> Any:
        nonlocal count
        count += 1
        for _ in range(calls.count(count)):
            signal.raise_signal(number)
        return forward(self, *args)

    monkeypatch.setattr(PaluMethod, "batch_losses", pressed)


SIGNALS = {
    signal.SIGINT: (
        KeyboardInterrupt,
        "\ninterrupted: ending this step, then writing a checkpoint; Ctrl-C again stops",
    ),
    signal.SIGTERM: (SystemExit, "\nterminated: ending this step, then writing a checkpoint\n"),
}


@pytest.mark.parametrize(
    ("number", "calls"),
    [(signal.SIGINT, (1,)), (signal.SIGINT, (STEPS,)), (signal.SIGTERM, (1,)), (signal.SIGTERM, (5, 5))],
)
def test_the_step_ends_and_a_checkpoint_is_written(
    number: signal.Signals,
    calls: tuple[int, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture,
) -> None:
    """And how to go on is said. A SIGTERM that comes twice asks for nothing more."""
    error, told = SIGNALS[number]
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        pressing(patch, *calls, number=number)
        with pytest.raises(error) as caught:
            unlearn(checkpoint_dir=str(tmp_path))
    said = capfd.readouterr().err
    assert said.count(told) == 1 and f"palu: stopped after step {calls[0]}\n" in said
    if number == signal.SIGTERM:
        assert caught.value.code == 143
    else:
        assert f"checkpoint_dir={str(tmp_path)!r}, resume=True" in str(caught.value)
    assert signal.getsignal(number) is before
    assert kept(tmp_path) == [calls[0]]
    assert_same(unlearn(checkpoint_dir=str(tmp_path), resume=True), loop_result("tied"))


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_after_either_stops_at_once(
    first: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    pressing(monkeypatch, 3)
    pressing(monkeypatch, 3, number=first)  # the outer one comes first
    with pytest.raises(KeyboardInterrupt):
        unlearn(checkpoint_dir=str(tmp_path), checkpoint_steps=2)
    assert kept(tmp_path) == [2]
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_ctrl_c_while_the_last_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = checkpoint.save_file

    def pressed(tensors: Any, path: Path, *args: Any) -> None:
        if path.name == step(STEPS):
            signal.raise_signal(signal.SIGINT)
        write(tensors, path, *args)

    monkeypatch.setattr(checkpoint, "save_file", pressed)
    with pytest.raises(KeyboardInterrupt):
        unlearn(checkpoint_dir=str(tmp_path))
    assert kept(tmp_path) == [STEPS]


def test_ctrl_c_before_the_first_step_and_without_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is nothing to keep yet, or nowhere to keep it."""
    model = tiny_llama()
    with monkeypatch.context() as patch:
        pressing(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            unlearn(model)
    monkeypatch.setattr(precompute, "pack", lambda *args, **more: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        unlearn(checkpoint_dir=str(tmp_path))
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_another_handler_is_left_alone(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pressed = []
    before = signal.signal(number, lambda *_: pressed.append(True))
    try:
        pressing(monkeypatch, 2, number=number)
        assert len(unlearn(checkpoint_dir=str(tmp_path)).history) == STEPS
        assert pressed == [True]
    finally:
        signal.signal(number, before)
