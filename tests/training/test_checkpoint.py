"""Checkpoints: a resumed run is the run that was not interrupted, and nothing else is resumed."""

import copy
import functools
import json
import pickle
import re
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.scenarios import ON_CPU, SCENARIOS, STEPS, Killed, assert_same, frozen_head, kept, loop_result, step
from helpers.tiny import forget_rows, overfit, retain_rows, same_weights, tiny_llama, weights
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

from palu import CheckpointError
from palu.ref_model import precompute
from palu.training import callbacks, checkpoint
from palu.training.checkpoint import Checkpoints
from palu.training.step import Run

pytestmark = ON_CPU
unlearn = SCENARIOS["tied"].loop


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


@pytest.fixture(autouse=True)
def no_pickle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is ever unpickled."""

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("unpickled")

    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, fail)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that ended, with checkpoints of steps 8 and 9; to be copied."""
    folder = tmp_path_factory.mktemp("finished")
    unlearn(checkpoint_dir=str(folder), checkpoint_steps=4)
    return folder


# --- A resumed run is the same run ---
@pytest.mark.parametrize("name", SCENARIOS)
def test_killed_and_resumed(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """After a step in an epoch: the same weights and records, bit by bit; with dropout also after any other one."""
    scenario, expected = SCENARIOS[name], loop_result(name)
    monkeypatch.setattr(checkpoint, "KEPT", STEPS)
    written = scenario.loop(checkpoint_dir=str(folder), checkpoint_steps=1)
    assert_same(written, expected)
    assert kept(folder) == [*range(1, STEPS + 1)]
    torch.rand(7)  # what was drawn before does not matter
    for last in range(STEPS, -1, -1) if name == "dropout" else (4,):
        for later in range(last + 1, STEPS + 1):
            (folder / step(later)).unlink(missing_ok=True)
        capsys.readouterr()
        resumed = scenario.loop(checkpoint_dir=str(folder), checkpoint_steps=99, resume=True)
        assert_same(resumed, expected)
        assert resumed.summary["config"]["learning_rate"] == expected.summary["config"]["learning_rate"]
        told = f"resuming after step {last}, from {folder / step(last)}" if last else "no checkpoint yet"
        assert told in capsys.readouterr().err


@pytest.mark.parametrize("every", [None, 1])
def test_stopping_early_is_resumed_as_stopped(every: int | None, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is not asked once more."""
    model = tiny_llama()
    overfit(model, forget_rows() + retain_rows())
    settings = {"epochs": 60, "probability_floor": 0.1, "learning_rate": 3e-3}
    settings |= {"checkpoint_dir": str(folder), "checkpoint_steps": every}
    asked = []
    monkeypatch.setattr(callbacks, "ask", lambda run: bool(asked.append(run)))
    stopped = unlearn(copy.deepcopy(model), **settings)
    assert stopped.summary["ended_by"] == "forgotten" and len(asked) == 1
    resumed = unlearn(copy.deepcopy(model), resume=True, **settings)
    assert_same(resumed, stopped)
    assert len(asked) == 1
    for name in ("epochs", "ended_by"):
        assert resumed.summary[name] == stopped.summary[name]


def test_seconds_of_all_parts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of a run that ends in the middle counts up to its last checkpoint, here an hour later by the clock."""
    now, after_step = 0.0, Checkpoints.after_step

    def clock() -> float:
        nonlocal now
        now += 1e-3
        return now

    def slow(self: Checkpoints, history: Any) -> None:
        nonlocal now
        now += 3600
        after_step(self, history)

    monkeypatch.setattr(checkpoint.time, "perf_counter", clock)
    monkeypatch.setattr(Checkpoints, "after_step", slow)
    unlearn(checkpoint_dir=str(folder), checkpoint_steps=4)
    (folder / step(9)).unlink()
    resumed = unlearn(checkpoint_dir=str(folder), resume=True)
    assert len(resumed.history) == 9
    assert resumed.summary["seconds"] == pytest.approx(9 * 3600, abs=60)


def test_the_reference_is_asked_once(finished: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = loop_result("tied")
    shutil.copytree(finished, folder)
    (folder / step(9)).unlink()
    (reference,) = folder.glob("reference-*.safetensors")
    reference.rename(folder / "kept")
    assert_same(unlearn(checkpoint_dir=str(folder), resume=True), expected)  # where its answers are lost, asked again
    (folder / step(9)).unlink()
    (folder / "kept").replace(reference)

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("asked again")

    monkeypatch.setattr(precompute, "compute_outputs", fail)
    may_change = {"checkpoint_steps": 1, "progress": True}  # as the folder's place
    assert_same(unlearn(checkpoint_dir=str(folder), resume=True, **may_change), expected)


# --- What is written ---
@pytest.mark.parametrize(
    ("seconds", "settings", "expected"),
    [
        (1, {}, [9]),
        (200, {}, [3, 6, 9]),
        (290, {"checkpoint_minutes": 20}, [5, 9]),
        (900, {}, [*range(1, 10)]),
        (900, {"checkpoint_steps": 4}, [4, 8, 9]),  # in place of minutes
        (1, {"checkpoint_minutes": 0.01}, [*range(1, 10)]),
    ],
    ids=str,
)
def test_checkpoints_by_time(
    seconds: float, settings: dict[str, Any], expected: list[int], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten minutes after the last one was written the next is due, at the end of a step; one is always last.

    A step takes these seconds, and to write a checkpoint takes 30. The last two stay.
    """
    now, written = 1000.0, []
    after_step, write = Checkpoints.after_step, Checkpoints._write

    def tick(self: Checkpoints, history: Any) -> None:
        nonlocal now
        now += seconds
        after_step(self, history)

    def slow(self: Checkpoints, path: Path, *args: Any) -> None:
        nonlocal now
        now += 30
        write(self, path, *args)
        written.append(path.name)

    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now)
    monkeypatch.setattr(Checkpoints, "after_step", tick)
    monkeypatch.setattr(Checkpoints, "_write", slow)
    unlearn(checkpoint_dir=str(folder), **settings)
    assert written == [*map(step, expected)]
    assert kept(folder) == expected[-2:]


def test_nothing_is_written_without_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    unlearn()
    assert list(tmp_path.iterdir()) == []


def test_frozen_weights_are_not_written(folder: Path) -> None:
    unlearn(frozen_head(), checkpoint_dir=str(folder))
    with safe_open(folder / step(9), "pt") as file:
        names = set(file.keys())
    assert "model.model.norm.weight" in names and "adamw.model.norm.weight.exp_avg" in names
    assert not any("lm_head" in name for name in names)


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


def test_killed_at_any_file_operation(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before each operation in turn of a run that writes twice and keeps one checkpoint."""
    settings = {"epochs": 1, "batch_size": 4}
    expected = unlearn(**settings)
    settings |= {"checkpoint_dir": str(folder), "checkpoint_steps": 1}
    kills = done = 0  # before death, as many operations are done as there were deaths

    def mortal(operation: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal done
            if done == kills:
                raise Killed
            done += 1
            return operation(*args, **kwargs)

        return call

    monkeypatch.setattr(checkpoint, "KEPT", 1)
    while True:
        with monkeypatch.context() as patch:
            for owner, name in FILE_OPERATIONS:
                patch.setattr(owner, name, mortal(getattr(owner, name)))
            done = 0
            try:
                unlearn(**settings)
                break
            except Killed:
                kills += 1
        assert_same(unlearn(resume=True, **settings), expected)
        assert kept(folder) == [2], kills
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

    given_back: list[int] = []
    with monkeypatch.context() as patch:
        owner = next(owner for owner, operation in FILE_OPERATIONS if operation == name)
        patch.setattr(owner, name, fail)
        patch.setattr(Run, "give_weights_back", lambda run: given_back.append(len(run.history)))
        with pytest.raises(CheckpointError) as caught:
            unlearn(model, checkpoint_dir=str(folder), resume=True)
    assert given_back == [9], "an engine that shards has them"
    told = (
        f"{folder / step(9)} could not be written: [Errno 28] No space left on device; {folder / step(8)} is intact, "
    )
    assert str(caught.value).startswith(told)
    assert (folder / step(8)).read_bytes() == before
    assert kept(folder) == [8]
    assert same_weights(model, weights(loop_result("tied").model))
    assert_same(unlearn(checkpoint_dir=str(folder), resume=True), loop_result("tied"))


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
    assert kept(folder) == []


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
        ({"ref_model": lambda: tiny_llama(seed=1)}, "the ref_model is another one"),
        ({"forget": lambda: forget_rows(seed=9)}, "the tokenised forget set is another one"),
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


def test_a_damaged_checkpoint(finished: Path, folder: Path) -> None:
    """It is named, and deleting it resumes from the older one; that one damaged too, from the beginning."""
    shutil.copytree(finished, folder)
    for name, fix in ((step(9), f"resume from {folder / step(8)}"), (step(8), "start from the beginning")):
        content = (folder / name).read_bytes()
        for damaged in (*(content[:length] for length in (0, 7, 100, 5000, -1)), pickle.dumps({"step": 5})):
            (folder / name).write_bytes(damaged)
            with pytest.raises(CheckpointError) as caught:
                unlearn(checkpoint_dir=str(folder), resume=True)
            pattern = re.escape(f"{folder / name} is damaged (") + r".+\); delete it to " + re.escape(fix)
            assert re.fullmatch(pattern, str(caught.value))
        (folder / name).unlink()
    assert_same(unlearn(checkpoint_dir=str(folder), resume=True), loop_result("tied"))


foreign = functools.partial(save_file, {"weight": torch.ones(3)})


@pytest.mark.parametrize(
    ("make", "resume", "message"),
    [
        (None, False, "{9} is the checkpoint of an earlier run; .*"),
        (foreign, True, "{10} was not written by palu.unlearn; move it out of the folder to resume from {9}"),
        (
            functools.partial(foreign, metadata={"palu": json.dumps({"format": checkpoint.FORMAT + 1})}),
            True,
            r"{10} has format \d, and this palu reads \d; resume with the palu that .*",
        ),
        (Path.mkdir, True, "{10} cannot be read: [^;]*"),  # that is no damage: nothing is said of deleting it
    ],
)
def test_what_is_there_is_refused(
    make: Callable[[Path], Any] | None, resume: bool, message: str, finished: Path, folder: Path
) -> None:
    shutil.copytree(finished, folder)
    if make:
        make(folder / step(10))
    before = sorted(folder.iterdir())
    for number in (9, 10):
        message = message.replace(f"{{{number}}}", re.escape(str(folder / step(number))))
    with pytest.raises(CheckpointError, match=f"^{message}$"):
        unlearn(checkpoint_dir=str(folder), resume=resume)
    assert sorted(folder.iterdir()) == before
