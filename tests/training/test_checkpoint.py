"""Checkpoints: a resumed run is the run that was not interrupted, and nothing else is resumed."""

import copy
import pickle
import re
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from helpers.scenarios import SCENARIOS, STEPS, Scenario, figures, frozen_head, of_driver
from helpers.tiny import forget_rows, overfit, retain_rows, same_weights, tiny_llama, weights
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

import palu
from palu import CheckpointError
from palu.config import UnlearnConfig
from palu.methods.palu import PaluMethod
from palu.ref_model import precompute
from palu.training import checkpoint
from palu.training.checkpoint import Checkpoints
from palu.training.dataloader import UnlearnDataLoader

# Another device would add in another order from run to run.
pytestmark = pytest.mark.skipif(Accelerator().device.type != "cpu", reason="bits are promised on a CPU")


def assert_same(one: palu.UnlearnResult, other: palu.UnlearnResult) -> None:
    assert figures(one.history) == figures(other.history)
    assert same_weights(one.model, weights(other.model))


unlearn = Scenario().loop


def steps(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def reference(folder: Path) -> Path:
    (path,) = folder.glob("reference-*.safetensors")
    return path


def step(number: int) -> str:
    return f"step-{number:08}.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that ended, with checkpoints of steps 8 and 9; to be copied."""
    folder = tmp_path_factory.mktemp("finished")
    unlearn(checkpoint_dir=str(folder), checkpoint_steps=4)
    return folder


# --- A resumed run is the same run ---
@pytest.mark.parametrize("name", of_driver("loop"))
def test_killed_and_resumed(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """After no step, one in an epoch or the last one of it, and after all: the same weights and records, bit by bit."""
    scenario = SCENARIOS[name]
    expected = scenario.loop()
    monkeypatch.setattr(checkpoint, "KEPT", STEPS)
    written = scenario.loop(checkpoint_dir=str(folder), checkpoint_steps=1)
    assert_same(written, expected)
    asked = [] if name in ("ga", "pdu") else [reference(folder).name]
    assert steps(folder) == [*asked, *map(step, range(1, STEPS + 1))]
    torch.rand(7)  # what was drawn before does not matter
    for last in range(STEPS, -1, -1) if name == "dropout" else (STEPS, 6, 2, 0):
        for later in range(last + 1, STEPS + 1):
            (folder / step(later)).unlink(missing_ok=True)
        capsys.readouterr()
        assert_same(scenario.loop(checkpoint_dir=str(folder), checkpoint_steps=99, resume=True), expected)
        told = f"resuming after step {last}, from {folder / step(last)}" if last else "no checkpoint yet"
        assert told in capsys.readouterr().err


def test_stopping_early_is_resumed_as_stopped(folder: Path) -> None:
    model = tiny_llama()
    overfit(model, forget_rows() + retain_rows())
    settings = {"epochs": 40, "probability_floor": 0.1, "learning_rate": 3e-3, "checkpoint_dir": str(folder)}
    stopped = unlearn(copy.deepcopy(model), **settings)
    assert stopped.summary["ended_by"] == "forgotten"
    resumed = unlearn(copy.deepcopy(model), resume=True, **settings)
    assert_same(resumed, stopped)
    for name in ("epochs", "ended_by"):
        assert resumed.summary[name] == stopped.summary[name]


def test_the_reference_is_asked_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = unlearn(checkpoint_dir=str(folder), checkpoint_steps=4)
    (folder / step(9)).unlink()
    reference(folder).rename(folder / "kept")
    assert_same(unlearn(checkpoint_dir=str(folder), resume=True), expected)  # where its answers are lost, asked again
    (folder / step(9)).unlink()
    (folder / "kept").replace(reference(folder))

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("asked again")

    monkeypatch.setattr(precompute, "compute_outputs", fail)
    assert_same(unlearn(checkpoint_dir=str(folder), resume=True), expected)


@pytest.mark.parametrize("retain_count", [0, 5])
def test_a_data_loader_goes_on_anywhere(retain_count: int) -> None:
    from palu.data.examples import load_forget, load_retain
    from palu.data.packing import forget_items, retain_items
    from palu.ref_model.cache import ReferenceCache

    forget = forget_items(load_forget(forget_rows(), None, max_length=99).examples, 2, None)
    retain = retain_items(load_retain(retain_rows(retain_count), None, max_length=99).examples)
    cache = ReferenceCache([{}] * len(forget))
    config = UnlearnConfig(batch_size=2, gradient_accumulation_steps=2, retain_batch_size=3)

    def rows(loader: UnlearnDataLoader, epochs: int) -> list[list[list[int]]]:
        return [[batch.packed.input_ids[0].tolist() for batch in step] for _ in range(epochs) for step in loader]

    whole = rows(UnlearnDataLoader(forget, retain, cache, config), 4)
    for taken in range(9):
        loader = UnlearnDataLoader(forget, retain, cache, config)
        epoch = loader.skip(taken)
        assert epoch == max(taken - 1, 0) // len(loader) + 1
        assert rows(loader, 5 - epoch) == whole[taken:]


# --- What is written ---
def test_interval_and_the_last_two(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    write = Checkpoints._write

    def spy(self: Checkpoints, path: Path, *args: Any) -> None:
        write(self, path, *args)
        seen.append(path.name)

    monkeypatch.setattr(Checkpoints, "_write", spy)
    unlearn(checkpoint_dir=str(folder), checkpoint_steps=2)
    assert seen == [*map(step, (2, 4, 6, 8, 9))]
    assert steps(folder) == [reference(folder).name, step(8), step(9)]


def written_by_time(monkeypatch: pytest.MonkeyPatch, seconds_per_step: float, **settings: Any) -> list[str]:
    """The names of the checkpoints of a run whose steps take this long; writing one takes 30 s."""
    now, names = 1000.0, []
    after_step, write = Checkpoints.after_step, Checkpoints._write

    def tick(self: Checkpoints, history: Any) -> None:
        nonlocal now
        now += seconds_per_step
        after_step(self, history)

    def slow(self: Checkpoints, path: Path, *args: Any) -> None:
        nonlocal now
        now += 30
        write(self, path, *args)
        names.append(path.name)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.time, "monotonic", lambda: now)
        patch.setattr(Checkpoints, "after_step", tick)
        patch.setattr(Checkpoints, "_write", slow)
        unlearn(**settings)
    return names


def test_checkpoints_by_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten minutes after the last one was written the next is due, at the end of a step; one is always last."""

    def written(seconds: float, **settings: Any) -> list[str]:
        folder = tmp_path / f"{seconds} {settings}"
        return written_by_time(monkeypatch, seconds, checkpoint_dir=str(folder), **settings)

    assert written(1) == [step(9)]
    assert written(200) == [*map(step, (3, 6, 9))]
    assert written(250) == [*map(step, (3, 6, 9))]
    assert written(290, checkpoint_minutes=20) == [*map(step, (5, 9))]
    assert written(900) == [*map(step, range(1, 10))]
    assert written(900, checkpoint_steps=4) == [*map(step, (4, 8, 9))], "steps take the place of minutes"
    assert written(1, checkpoint_minutes=0.01) == [*map(step, range(1, 10))]


def test_nothing_is_written_without_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    unlearn()
    assert list(tmp_path.iterdir()) == []


def test_frozen_weights_are_not_written(folder: Path) -> None:
    from safetensors import safe_open

    unlearn(frozen_head(), checkpoint_dir=str(folder))
    with safe_open(folder / step(9), "pt") as file:
        names = set(file.keys())
    assert "model.model.norm.weight" in names and "adamw.model.norm.weight.exp_avg" in names
    assert not any("lm_head" in name for name in names)


def test_no_pickle(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("unpickled")

    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, fail)
    expected = unlearn(checkpoint_dir=str(folder), checkpoint_steps=5)
    (folder / step(9)).unlink()
    assert_same(unlearn(checkpoint_dir=str(folder), resume=True), expected)
    for path in folder.iterdir():
        path.write_bytes(pickle.dumps({"step": 5}))
    with pytest.raises(CheckpointError, match="is damaged"):
        unlearn(checkpoint_dir=str(folder), resume=True)


# --- Death and full disks while writing ---
FILE_OPERATIONS = [
    (checkpoint.shutil, "rmtree"),
    (checkpoint.Path, "mkdir"),
    (checkpoint, "save_file"),
    (checkpoint.os, "posix_fallocate"),
    (checkpoint.os, "fsync"),
    (checkpoint.os, "replace"),
    (checkpoint.Path, "unlink"),
]


class Killed(BaseException):
    """Stands for SIGKILL: from then on, nothing reaches the disk."""


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
def test_killed_at_any_file_operation(late: bool, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before each operation in turn, or after it, of a run that writes twice and keeps one checkpoint."""
    settings = {"epochs": 1, "batch_size": 4}
    expected = unlearn(**settings)
    settings |= {"checkpoint_dir": str(folder), "checkpoint_steps": 1}
    deadline = done = 0  # operations until death, and done so far

    def mortal(operation: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal done
            done += 1
            if done > deadline or (done == deadline and not late):
                raise Killed
            result = operation(*args, **kwargs)
            if done == deadline:
                raise Killed
            return result

        return call

    monkeypatch.setattr(checkpoint, "KEPT", 1)
    kills = 0
    while True:
        with monkeypatch.context() as patch:
            for owner, name in FILE_OPERATIONS:
                patch.setattr(owner, name, mortal(getattr(owner, name)))
            deadline, done = kills + 1, 0
            try:
                unlearn(**settings)
                break
            except Killed:
                kills += 1
        assert_same(unlearn(resume=True, **settings), expected)
        assert steps(folder) == [reference(folder).name, step(2)], deadline
        shutil.rmtree(folder)
    assert kills > 3 * len(FILE_OPERATIONS), "not every operation was met"


@pytest.mark.parametrize("name", ["mkdir", "save_file", "fsync", "replace"])
def test_a_write_that_fails(name: str, finished: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The older checkpoint is what it was, the model has the weights of the step, and resuming works."""
    shutil.copytree(finished, folder)
    (folder / step(9)).unlink()
    before = (folder / step(8)).read_bytes()
    model = tiny_llama()

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        owner = next(owner for owner, operation in FILE_OPERATIONS if operation == name)
        patch.setattr(owner, name, fail)
        with pytest.raises(CheckpointError) as caught:
            unlearn(model, checkpoint_dir=str(folder), resume=True)
    told = (
        f"{folder / step(9)} could not be written: [Errno 28] No space left on device; {folder / step(8)} is intact, "
    )
    assert str(caught.value).startswith(told)
    assert (folder / step(8)).read_bytes() == before
    assert steps(folder) == [reference(folder).name, step(8)]
    expected = unlearn()
    assert same_weights(model, weights(expected.model))
    assert_same(unlearn(checkpoint_dir=str(folder), resume=True), expected)


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may grow beyond 100 kB: a write fails in the middle, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_file_that_grows_too_large(small_files: None, folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"could not be written: .*too large.*; there is no earlier one"):
        unlearn(checkpoint_dir=str(folder))
    assert steps(folder) == [reference(folder).name]


# --- Ctrl-C ---
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


@pytest.mark.usefixtures("in_the_foreground")
@pytest.mark.parametrize(
    ("number", "calls"),
    [(signal.SIGINT, (1,)), (signal.SIGINT, (STEPS,)), (signal.SIGTERM, (1,)), (signal.SIGTERM, (5, 5))],
)
def test_the_step_ends_and_a_checkpoint_is_written(
    number: signal.Signals,
    calls: tuple[int, ...],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture,
) -> None:
    """And how to go on is said. A SIGTERM that comes twice asks for nothing more."""
    error, told = SIGNALS[number]
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        pressing(patch, *calls, number=number)
        with pytest.raises(error) as caught:
            unlearn(checkpoint_dir=str(folder))
    said = capfd.readouterr().err
    assert said.count(told) == 1 and f"palu: stopped after step {calls[0]}\n" in said
    if number == signal.SIGTERM:
        assert caught.value.code == 143
    else:
        assert f"checkpoint_dir={str(folder)!r}, resume=True" in str(caught.value)
    assert signal.getsignal(number) is before
    assert steps(folder) == [reference(folder).name, step(calls[0])]
    assert_same(unlearn(checkpoint_dir=str(folder), resume=True), unlearn())


@pytest.mark.usefixtures("in_the_foreground")
@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_after_either_stops_at_once(
    first: signal.Signals, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    pressing(monkeypatch, 3)
    pressing(monkeypatch, 3, number=first)  # the outer one comes first
    with pytest.raises(KeyboardInterrupt):
        unlearn(checkpoint_dir=str(folder), checkpoint_steps=2)
    assert steps(folder) == [reference(folder).name, step(2)]
    assert [signal.getsignal(number) for number in SIGNALS] == before


@pytest.mark.usefixtures("in_the_foreground")
def test_ctrl_c_while_the_last_checkpoint_is_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = checkpoint.save_file

    def pressed(tensors: Any, path: Path, *args: Any) -> None:
        if path.name == step(STEPS):
            signal.raise_signal(signal.SIGINT)
        write(tensors, path, *args)

    monkeypatch.setattr(checkpoint, "save_file", pressed)
    with pytest.raises(KeyboardInterrupt):
        unlearn(checkpoint_dir=str(folder))
    assert steps(folder) == [reference(folder).name, step(STEPS)]


@pytest.mark.usefixtures("in_the_foreground")
def test_ctrl_c_before_the_first_step_and_without_a_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is nothing to keep yet, or nowhere to keep it."""
    model = tiny_llama()
    with monkeypatch.context() as patch:
        pressing(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            unlearn(model)
    make = PaluMethod.hidden_states

    def pressed(*args: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return make(*args)

    monkeypatch.setattr(PaluMethod, "hidden_states", staticmethod(pressed))
    with pytest.raises(KeyboardInterrupt):
        unlearn(checkpoint_dir=str(folder))
    assert [path.suffix for path in folder.iterdir()] == [".lock"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_another_handler_is_left_alone(number: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pressed = []
    before = signal.signal(number, lambda *_: pressed.append(True))
    try:
        pressing(monkeypatch, 2, number=number)
        assert len(unlearn(checkpoint_dir=str(folder)).history) == STEPS
        assert pressed == [True]
    finally:
        signal.signal(number, before)


# --- What is refused ---
def frozen_norm() -> LlamaForCausalLM:
    model = tiny_llama()
    model.model.norm.weight.requires_grad_(False)
    return model


@pytest.mark.parametrize(
    ("changed", "differences"),
    [
        ({"learning_rate": 2e-3}, "learning_rate was 0.001 and is 0.002"),
        ({"epochs": 4, "seed": 1}, "epochs was 3 and is 4; seed was 0 and is 1"),
        ({"objective": "npo"}, "objective was 'palu' and is 'npo'"),
        ({"model": lambda: tiny_llama(seed=1)}, "the model is another one"),
        ({"model": lambda: tiny_llama(attention_dropout=0.1)}, "the model is another one"),
        ({"ref_model": lambda: tiny_llama(seed=1)}, "the ref_model is another one"),
        ({"forget": lambda: forget_rows(seed=9)}, "the tokenised forget set is another one"),
        ({"forget": lambda: forget_rows()[::-1]}, "the tokenised forget set is another one"),
        ({"retain": lambda: retain_rows(11)}, "the tokenised retain set is another one"),
        ({"model": frozen_norm}, "the choice of trainable parameters is another one"),
    ],
)
def test_another_run(changed: dict[str, Any], differences: str, finished: Path, folder: Path) -> None:
    """Nothing is touched, neither the folder nor the model."""
    shutil.copytree(finished, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    arguments = {name: value() if callable(value) else value for name, value in changed.items()}
    model = arguments.setdefault("model", tiny_llama())
    untouched = weights(model)
    with pytest.raises(CheckpointError, match=re.escape(f"{folder / step(9)} belongs to another run: {differences}.")):
        unlearn(checkpoint_dir=str(folder), resume=True, **arguments)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert same_weights(model, untouched)


def test_what_may_change(finished: Path, folder: Path) -> None:
    """Where and how often checkpoints are written, and a folder that was moved."""
    shutil.copytree(finished, folder)
    unlearn(checkpoint_dir=str(folder), checkpoint_steps=1, resume=True, progress=True)


def test_an_earlier_run_is_not_overwritten(finished: Path) -> None:
    with pytest.raises(CheckpointError, match=re.escape(f"{finished / step(9)} is the checkpoint of an earlier run; ")):
        unlearn(checkpoint_dir=str(finished))


@pytest.mark.parametrize("length", [0, 7, 100, 5000, -1])
def test_a_truncated_checkpoint(length: int, finished: Path, folder: Path) -> None:
    """It is named, and deleting it resumes from the older one; that one damaged too, from the beginning."""
    shutil.copytree(finished, folder)
    expected = unlearn()
    for name, fix in ((step(9), f"resume from {folder / step(8)}"), (step(8), "start from the beginning")):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:length])
        with pytest.raises(CheckpointError) as caught:
            unlearn(checkpoint_dir=str(folder), resume=True)
        pattern = re.escape(f"{folder / name} is damaged (") + r".+\); delete it to " + re.escape(fix)
        assert re.fullmatch(pattern, str(caught.value))
        (folder / name).unlink()
    assert_same(unlearn(checkpoint_dir=str(folder), resume=True), expected)


def test_a_foreign_file(finished: Path, folder: Path) -> None:
    shutil.copytree(finished, folder)
    save_file({"weight": torch.ones(3)}, folder / step(10))
    told = f"{folder / step(10)} was not written by palu.unlearn; move it out of the folder to resume from {folder}"
    with pytest.raises(CheckpointError, match=f"^{re.escape(told)}/"):
        unlearn(checkpoint_dir=str(folder), resume=True)


def test_another_format(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "FORMAT", checkpoint.FORMAT + 1)
    with pytest.raises(CheckpointError, match=r"has format \d, and this palu reads \d; resume with the palu that"):
        unlearn(checkpoint_dir=str(finished), resume=True)


def test_a_checkpoint_that_cannot_be_read(finished: Path, folder: Path) -> None:
    """That is no damage: nothing is said of deleting it."""
    shutil.copytree(finished, folder)
    (folder / step(10)).mkdir()
    with pytest.raises(CheckpointError, match=r"step-00000010.safetensors cannot be read: [^;]*$"):
        unlearn(checkpoint_dir=str(folder), resume=True)
