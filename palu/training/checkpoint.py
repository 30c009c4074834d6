"""Checkpoints: a run that was killed at any moment resumes as if it had not been.

What differs from step to step is the trainable weights, AdamW's state, torch's random numbers and the history; the
place in the data follows from the history, and frozen weights from the starting model, which is loaded again. A folder
of checkpoints holds, as safetensors with JSON in their headers::

    reference-KEY.safetensors    what the reference gave (:mod:`palu.ref_model.storage`), unless cache_dir keeps it
    step-00000050.safetensors    the run after 50 steps; the last two are kept, and a third while it is written
    unfinished/                  what is being written; a file moves out of it when it is on the disk

Every checkpoint names its run: the settings, the key of the reference cache, and SHA-256 fingerprints of the starting
model, the reference and the data. Nothing is ever unpickled. Of many processes the main one writes, whole tensors even
of what FSDP2 shards; all read.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from palu.config import UnlearnConfig
from palu.data.packing import Item
from palu.distributed import compute_on_main, full_tensor, raise_on_all_ranks, shard_like
from palu.hashing import digest
from palu.models.lora import CausalLM
from palu.ref_model.storage import item_from_json, item_to_json, map_file, reference_key, sync
from palu.signals import TERMINATED, exit_on_sigterm
from palu.training.datasets import RunData
from palu.training.optimizer import load_state

FORMAT = 6
KEPT = 2
# None of these settings has a part in the result.
MAY_CHANGE_ON_RESUME = {"cache_dir", "checkpoint_dir", "checkpoint_minutes", "checkpoint_steps", "resume"}
MAY_CHANGE_ON_RESUME |= {"eval_steps", "progress", "report_to", "logging_dir"}

# The handlers that a run takes the place of: Python's own, and the command's.
_USUAL = {signal.SIGINT: (signal.default_int_handler,), signal.SIGTERM: (signal.SIG_DFL, exit_on_sigterm)}

History = list[dict[str, float]]


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, read or resumed from; those that exist are as they were."""


class Checkpoints:
    """The checkpoints of one run. Without ``config.checkpoint_dir`` nothing is kept and no method does anything.

    ``run``: what :func:`describe_run` says of it. Raises CheckpointError where the folder holds checkpoints and
    ``resume`` is off, or the newest one is damaged, foreign or another run's.
    """

    def __init__(self, config: UnlearnConfig, accelerator: Accelerator, run: dict[str, Any]):
        self.accelerator, self.run = accelerator, run
        self.started = time.perf_counter()  # in a resumed run it is put back by what was taken before
        self.reference_key: str = run.get("reference", "")  # of the reference cache; empty: nothing is kept on disk
        self.minutes, self.every = config.checkpoint_minutes, config.checkpoint_steps
        self.folder = None if config.checkpoint_dir is None else Path(config.checkpoint_dir)
        self.stopped_by: int | None = None  # the signal that came
        self.ended_by: str | None = None  # what ended the run before its last step: "callback" or "forgotten"
        self.evaluation_before: dict[str, float] = {}  # the metrics before the first step
        self.returned: list[int] = []  # what of the watched takes part in this epoch, by the loader's number
        self.told: list[Item] = []  # answers of the model that told a secret when it was asked
        if self.folder is None:
            return
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            raise CheckpointError(
                "DeepSpeed keeps its optimizer's state to itself, so no checkpoint can be written; use FSDP2, DDP or "
                "one process, or leave checkpoint_dir out"
            )
        existing = self._steps()
        if existing and not config.resume:
            raise CheckpointError(
                f"{existing[-1]} is the checkpoint of an earlier run; pass resume=True to go on with that run, "
                "or another checkpoint_dir to keep it and start again"
            )
        if existing:
            self._read(existing[-1])
        elif config.resume:
            self._say(f"{self.folder} holds no checkpoint yet: starting from the beginning")

    @property
    def seconds(self) -> float:
        """How long the run has taken, with what it took before the checkpoint from which it was resumed."""
        return time.perf_counter() - self.started

    def restore(
        self,
        model: CausalLM,
        optimizer: torch.optim.Optimizer,
        scheduler: torch.optim.lr_scheduler.LRScheduler,
    ) -> History:
        """Restore the newest checkpoint; return its history, which is empty in a new run."""
        self.model, self.optimizer, self.scheduler = model, optimizer, scheduler
        self.saved: tuple[int, str | None] = (0, None)  # steps and end of the run, as the newest checkpoint has them
        self.written = time.monotonic()
        if self.folder is None or not (existing := self._steps()):
            return []
        self._tidy()  # a kill may have come between writing and tidying
        tensors, about = self._read(existing[-1])
        states: list[dict[str, Tensor]] = []
        with torch.no_grad():
            for name, parameter in _trainable(model).items():
                parameter.copy_(shard_like(parameter, tensors[f"model.{name}"]))
                prefix = f"adamw.{name}."
                saved = {key.removeprefix(prefix): tensors[key] for key in tensors if key.startswith(prefix)}
                states.append({k: part if k == "step" else shard_like(parameter, part) for k, part in saved.items()})
        scheduler.load_state_dict(about["scheduler"])
        load_state(optimizer, states, float(scheduler.get_last_lr()[0]))
        own = self.accelerator.process_index
        torch.set_rng_state(tensors["rng.cpu"][own].clone())
        if "rng.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["rng.cuda"][own].clone(), self.accelerator.device)
        self.ended_by, self.evaluation_before = about["ended_by"], about["evaluation_before"]
        self.returned, self.told = about["returned"], [item_from_json(one) for one in about["told"]]
        self.started -= about["seconds"]
        self.saved = (len(about["history"]), self.ended_by)
        self._say(f"resuming after step {self.saved[0]}, from {existing[-1]}")
        return about["history"]

    def after_step(self, history: History) -> None:
        """Write a checkpoint where one is due or a signal came; a signal then raises its exception."""
        if self.folder is None:
            return
        due = time.monotonic() - self.written >= 60 * self.minutes
        if self.accelerator.num_processes > 1:  # signals reach them at different steps; the main one's clock decides
            requests = [self.stopped_by or 0, due and self.accelerator.is_main_process]
            flags = torch.tensor(requests, dtype=torch.int32, device=self.accelerator.device)
            signals, clocks = self.accelerator.gather(flags[None]).T.tolist()
            self.stopped_by, due = max(signals) or None, any(clocks)
        if self.every is not None:
            due = len(history) % self.every == 0
        if self.stopped_by is not None or due:
            self.save(history)
            self._stop_if_asked()

    def save(self, history: History) -> None:
        """Write a checkpoint of the run after the last step of ``history``, unless there is one; drop older ones.

        One that was written before something ended the run after that step is replaced.
        """
        ended = (len(history), self.ended_by)
        if self.folder is None or ended == self.saved:
            return
        tensors = {"rng.cpu": self._of_all(torch.get_rng_state())}
        if self.accelerator.device.type == "cuda":
            tensors["rng.cuda"] = self._of_all(torch.cuda.get_rng_state(self.accelerator.device))
        for name, parameter in _trainable(self.model).items():
            parts = {f"model.{name}": parameter.detach()}
            parts |= {f"adamw.{name}.{key}": part for key, part in self.optimizer.state.get(parameter, {}).items()}
            for key, part in parts.items():
                full = full_tensor(part)  # all processes take part, and the main one keeps it
                if self.accelerator.is_main_process:
                    tensors[key] = full.contiguous() if full is part else full.cpu()
        path = self.folder / f"step-{len(history):08}.safetensors"
        about = {
            "history": history,
            "scheduler": self.scheduler.state_dict(),
            "seconds": self.seconds,
            "ended_by": self.ended_by,
            "evaluation_before": self.evaluation_before,
            "returned": self.returned,
            "told": [item_to_json(item) for item in self.told],
        }
        with raise_on_all_ranks(self.accelerator):
            if self.accelerator.is_main_process:
                self._write(path, tensors, about)
        self.saved, self.written = ended, time.monotonic()
        self._tidy()

    @contextmanager
    def signals_deferred(self) -> Iterator[None]:
        """Make Ctrl-C and SIGTERM wait for the end of the step, unless the user handles them."""
        handlers: dict[int, Any] = {}
        if self.folder is not None and threading.current_thread() is threading.main_thread():
            found = {number: signal.getsignal(number) for number in _USUAL}
            handlers = {number: handler for number, handler in found.items() if handler in _USUAL[number]}
        for number in handlers:
            signal.signal(number, self._on_signal)
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        self._stop_if_asked()  # by a signal that came after the last step

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        # Half an optimizer step is no state to keep: the step ends first, unless the user insists by Ctrl-C. A second
        # SIGTERM is no insistence, since a cluster and its launcher may each send one.
        message = b"terminated: ending this step, then writing a checkpoint"
        if number == signal.SIGINT:
            if self.stopped_by is not None:
                signal.default_int_handler(number, frame)
            message = b"interrupted: ending this step, then writing a checkpoint; Ctrl-C again stops at once"
        if self.stopped_by is None:
            self.stopped_by = number
            with suppress(OSError):  # not print: the interrupted code may be printing
                os.write(2, b"\n" + message + b"\n")

    def _stop_if_asked(self) -> None:
        if self.stopped_by is None:
            return
        self._say(f"stopped after step {self.saved[0]}")
        if self.stopped_by == signal.SIGTERM:
            raise SystemExit(TERMINATED)
        raise KeyboardInterrupt(
            "to go on, load the starting model and call palu.unlearn with the same arguments and "
            f"checkpoint_dir={str(self.folder)!r}, resume=True"
        )

    def _of_all(self, state: Tensor) -> Tensor:
        """Gather the vectors [n] of all processes: [processes, n]."""
        return self.accelerator.gather(state[None].to(self.accelerator.device)).cpu()

    def _steps(self) -> list[Path]:
        """List the checkpoints, oldest first."""
        return [] if self.folder is None else sorted(self.folder.glob("step-*.safetensors"))

    def _tidy(self) -> None:
        """Delete all but the newest checkpoints, and what a killed run left unfinished."""
        if self.folder is not None and self.accelerator.is_main_process:
            shutil.rmtree(self.folder / "unfinished", ignore_errors=True)
            # Whoever still waits for the lock finds the reference's outputs written.
            left = [path for kind in ("partial", "lock") for path in self.folder.glob(f"reference-*.{kind}")]
            for old in [*left, *self._steps()[:-KEPT]]:
                old.unlink(missing_ok=True)

    def _write(self, path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        """Write a file so that after a kill or a power cut it is there whole or not at all."""
        header = {"format": FORMAT, "run": self.run, **about}
        unfinished = path.parent / "unfinished"
        try:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
            save_file(dict(tensors), unfinished / path.name, {"palu": json.dumps(header)})
            sync(unfinished / path.name)
            os.replace(unfinished / path.name, path)
            sync(path.parent)
        except (OSError, SafetensorError) as error:
            existing = self._steps()
            intact = f"{existing[-1]} is intact" if existing else "there is no earlier one"
            raise CheckpointError(
                f"{path} could not be written: {error}; {intact}, and the model keeps the weights of its last step. "
                "Make room or repair the folder, load the starting model again and pass resume=True"
            ) from error
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)

    def _read(self, path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Map a file's tensors and read its header, and check that it is whole and this run's."""
        older = [p for p in self._steps() if p < path]
        without = f"resume from {older[-1]}" if older else "start from the beginning"
        tensors, header = map_file(path, CheckpointError, f"delete it to {without}")
        if not isinstance(header, dict):
            raise CheckpointError(f"{path} was not written by palu.unlearn; move it out of the folder to {without}")
        if header.get("format") != FORMAT:
            raise CheckpointError(
                f"{path} has format {header.get('format')}, and this palu reads {FORMAT}; "
                "resume with the palu that wrote it, or start in another checkpoint_dir"
            )
        if differences := compare(header["run"], self.run):
            raise CheckpointError(
                f"{path} belongs to another run: {'; '.join(differences)}. "
                "Pass what that run was started with, or another checkpoint_dir to start again"
            )
        return tensors, header

    def _say(self, message: str) -> None:
        if self.accelerator.is_main_process:
            tqdm.write(f"palu: {message}", file=sys.stderr)


def open_checkpoints(
    model: CausalLM, ref_model: CausalLM | None, data: RunData, accelerator: Accelerator
) -> Checkpoints:
    """Open the run's checkpoints: with ``resume`` the newest one is this run's, or an error says what differs."""
    run = compute_on_main(lambda: describe_run(model, ref_model, data, accelerator), accelerator)
    with raise_on_all_ranks(accelerator):
        return Checkpoints(data.config, accelerator, run)


def describe_run(
    model: CausalLM, ref_model: CausalLM | None, data: RunData, accelerator: Accelerator
) -> dict[str, Any]:
    """Describe what must be the same on resume: values, and fingerprints of what is too large to keep.

    It holds the key of the reference cache, too. A run that keeps nothing on disk needs no description, and gets none.
    The models must still be untouched.
    """
    config, fingerprints = data.config, data.fingerprints(model, ref_model)
    if config.cache_dir is None and config.checkpoint_dir is None:
        return {}
    key = reference_key(config, accelerator, fingerprints)
    if config.checkpoint_dir is None:
        return {"reference": key}
    settings = {name: value for name, value in config.values().items() if name not in MAY_CHANGE_ON_RESUME}
    settings |= {
        "mixed_precision": accelerator.mixed_precision,
        "device": accelerator.device.type,
        "processes": accelerator.num_processes,
    }
    models = {
        "model": fingerprints.model,
        "ref_model": fingerprints.ref_model,
        "choice of trainable parameters": digest(sorted(_trainable(model))),
    }
    sets = {
        "tokenised forget set": fingerprints.forget,
        "tokenised retain set": fingerprints.retain,
        "choice of earlier requests": fingerprints.earlier,
        "choice of everyday prompts": fingerprints.anchor_prompts,
    }
    run = {"settings": settings, "models": models, "data": sets, "reference": key}
    # As JSON gives it back: numbers of NumPy become Python's.
    return json.loads(json.dumps(run, default=float))


def compare(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """Say in words what differs between two descriptions of a run."""

    def differing(part: str) -> list[str]:
        return [name for name in saved[part] | current[part] if saved[part].get(name) != current[part].get(name)]

    old, new = saved["settings"], current["settings"]
    differ = differing("settings")
    if old.get("objective") != new.get("objective"):  # which has other settings
        differ = [name for name in differ if name in old.keys() & new.keys()]
    if differ:  # another setting also makes other items of the same data: then those say nothing
        words = [f"{name} was {old.get(name)!r} and is {new.get(name)!r}" for name in differ]
        return words + [f"the {name} is another one" for name in differing("models")]
    names = differing("models") + differing("data")
    if not names and saved["reference"] != current["reference"]:  # by how it is made: all else is compared above
        names = ["key of the reference cache"]
    return [f"the {name} is another one" for name in names]


def _trainable(model: CausalLM) -> dict[str, torch.nn.Parameter]:
    """Return the parameters that training changes, by name, in the optimizer's order; tied ones once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
