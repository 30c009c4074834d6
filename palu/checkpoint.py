"""Checkpoints: a run that was killed at any moment goes on as if it had not been.

What differs from step to step is the trainable weights, AdamW's moments, torch's random numbers and the history; the
place in the data, the schedule and an objective's own variables follow from the history, and frozen weights from the
starting model, which is loaded again. A folder of checkpoints holds, as safetensors with JSON in their headers::

    reference.safetensors        what the reference answered, and the anchors it wrote; written once
    step-00000050.safetensors    the run after 50 steps; the last two are kept
    unfinished/                  what is being written; a file moves out of it when it is on the disk

Every file names its run: the settings, and SHA-256 fingerprints of the starting model, the reference and the data.
Nothing is ever unpickled. Under DDP the main process writes, and all go on with its random numbers.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from palu.adapter import CausalLM
from palu.anchors import Everyday
from palu.cache import ReferenceCache
from palu.config import UnlearnConfig
from palu.objective import Objective
from palu.packing import Item

FORMAT = 1
KEPT = 2
ADAMW = ("step", "exp_avg", "exp_avg_sq")
ANCHOR = ("input_ids", "rows", "labels")
# Settings that may change on resume: none of them has a part in the result.
FREE = {"checkpoint_dir", "checkpoint_steps", "resume", "progress"}
# Other engines shard weights and optimizer states over processes.
WHOLE = {DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU}

History = list[dict[str, float]]


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, read or resumed from; those that exist are as they were."""


class Checkpoints:
    """The checkpoints of one run. Without ``config.checkpoint_dir`` it keeps nothing and no method does anything.

    As a context it makes Ctrl-C wait for the end of the step, once :meth:`restore` was called.

    Args:
        config: ``checkpoint_dir``, ``checkpoint_steps`` and ``resume``.
        accelerator: its main process writes, all processes read.
        model, ref_model, forget, retain, everyday: what the run starts from; the model is still untouched.

    Raises:
        CheckpointError: the folder holds checkpoints and ``resume`` is off; or the newest one is damaged, foreign or
            another run's.
    """

    def __init__(
        self,
        config: UnlearnConfig,
        accelerator: Accelerator,
        model: CausalLM,
        ref_model: CausalLM | None,
        forget: Sequence[Item],
        retain: Sequence[Item],
        everyday: Everyday,
    ):
        self.accelerator = accelerator
        self.interval = config.checkpoint_steps
        self.folder = None if config.checkpoint_dir is None else Path(config.checkpoint_dir)
        self.interrupted = self.running = False
        if self.folder is None:
            return
        if accelerator.distributed_type not in WHOLE:
            raise CheckpointError(
                f"checkpoints hold whole models, which {accelerator.distributed_type.value} does not keep on one "
                "process; use DDP or one process, or leave checkpoint_dir out"
            )
        existing = self._steps()
        if existing and not config.resume:
            raise CheckpointError(
                f"{existing[-1]} is the checkpoint of an earlier run; pass resume=True to go on with that run, "
                "or another checkpoint_dir to keep it and start anew"
            )
        self.run = describe_run(config, accelerator, model, ref_model, forget, retain, everyday)
        self.resumes = config.resume
        if existing:
            self._read(existing[-1])
        elif config.resume:
            self._say(f"{self.folder} holds no checkpoint yet: starting from the beginning")

    def reference(self) -> tuple[ReferenceCache, list[Item]] | None:
        """The reference's answers, and the anchors it wrote, where this run has kept them."""
        if self.folder is None or not self.resumes or not (path := self.folder / "reference.safetensors").exists():
            return None
        tensors, about = self._read(path, tensors=True)
        anchors = []
        for i in range(about["anchors"]):
            input_ids, rows, labels = (tensors.pop(f"anchor.{i}.{part}").clone() for part in ANCHOR)
            anchors.append(Item(input_ids, rows, labels))
        answers: dict[int, list[Tensor]] = {}
        for name in sorted(tensors):  # item number, answer number
            answers.setdefault(int(name.split(".")[0]), []).append(tensors[name].clone())
        return ReferenceCache([tuple(answers[i]) for i in sorted(answers)]), anchors

    def keep_reference(self, cache: ReferenceCache, anchors: Sequence[Item]) -> None:
        """Write the reference's answers: the weights they came from may not outlive the first step."""
        if self.folder is not None:
            tensors = {f"{i}.{k}": part for i, parts in enumerate(cache.answers) for k, part in enumerate(parts)}
            tensors |= {f"anchor.{i}.{part}": getattr(item, part) for i, item in enumerate(anchors) for part in ANCHOR}
            self._write(self.folder / "reference.safetensors", tensors, {"anchors": len(anchors)})

    def restore(
        self,
        model: CausalLM,
        optimizer: torch.optim.Optimizer,
        scheduler: torch.optim.lr_scheduler.LRScheduler,
        objective: Objective,
    ) -> History:
        """Put everything where the newest checkpoint left it; returns its history, which is empty in a new run."""
        self.model, self.optimizer, self.scheduler = model, optimizer, scheduler
        self.running, self.saved = True, 0
        if self.folder is None or not (existing := self._steps()):
            return []
        self._tidy()  # a kill may have come between writing and tidying
        tensors, about = self._read(existing[-1], tensors=True)
        trained = _trainable(model)
        moments: dict[int, dict[str, Tensor]] = {}
        with torch.no_grad():
            for i, (name, parameter) in enumerate(trained.items()):
                parameter.copy_(tensors[f"model.{name}"])
                # A parameter that no gradient has reached has none.
                prefix = f"adamw.{name}."
                moments[i] = {key: tensors[prefix + key].clone() for key in ADAMW if prefix + key in tensors}
        groups = optimizer.state_dict()["param_groups"]
        scheduler.load_state_dict(about["scheduler"])
        for group, rate in zip(groups, scheduler.get_last_lr(), strict=True):
            group["lr"] = rate
        optimizer.load_state_dict({"state": {i: m for i, m in moments.items() if m}, "param_groups": groups})
        for record in about["history"]:
            objective.after_step(record)
        torch.set_rng_state(tensors["rng.cpu"])
        if "rng.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["rng.cuda"], self.accelerator.device)
        self.saved = len(about["history"])
        self._say(f"resuming after step {self.saved}, from {existing[-1]}")
        return about["history"]

    def after_step(self, history: History) -> None:
        """Write a checkpoint where one is due, or where Ctrl-C was pressed; then raise KeyboardInterrupt."""
        if self.folder is not None and (self.interrupted or len(history) % self.interval == 0):
            self.save(history)
            self._stop_if_interrupted()

    def save(self, history: History) -> None:
        """Write a checkpoint of the run after the last step of ``history``, unless there is one; drop older ones."""
        if self.folder is None or len(history) == self.saved:
            return
        tensors = {"rng.cpu": torch.get_rng_state()}
        if self.accelerator.device.type == "cuda":
            tensors["rng.cuda"] = torch.cuda.get_rng_state(self.accelerator.device)
        for name, parameter in _trainable(self.model).items():
            tensors[f"model.{name}"] = parameter.detach().contiguous()
            moments = self.optimizer.state.get(parameter, {})
            tensors |= {f"adamw.{name}.{key}": moments[key].contiguous() for key in ADAMW if key in moments}
        path = self.folder / f"step-{len(history):08}.safetensors"
        self._write(path, tensors, {"history": history, "scheduler": self.scheduler.state_dict()})
        self.saved = len(history)
        self._tidy()

    def __enter__(self) -> Checkpoints:
        """Take Ctrl-C over, where it would raise KeyboardInterrupt wherever the program happens to be."""
        self.takes_over = (
            self.folder is not None
            and threading.current_thread() is threading.main_thread()
            and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        )
        if self.takes_over:
            signal.signal(signal.SIGINT, self._on_interrupt)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if self.takes_over:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        self.running = False
        if kind is None:  # pressed after the last step
            self._stop_if_interrupted()

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
        # Half an optimizer step is no state to keep: the step ends first, unless the user insists.
        if self.interrupted or not self.running:
            signal.default_int_handler(number, frame)
        self.interrupted = True
        with suppress(OSError):  # not print: the interrupted code may be printing
            os.write(2, b"\ninterrupted: ending this step, then writing a checkpoint; Ctrl-C again stops at once\n")

    def _stop_if_interrupted(self) -> None:
        if self.interrupted:
            self._say(
                f"stopped after step {self.saved}; to go on, load the starting model and call palu.unlearn with the "
                f"same arguments and checkpoint_dir={str(self.folder)!r}, resume=True"
            )
            raise KeyboardInterrupt

    def _steps(self) -> list[Path]:
        """The checkpoints, oldest first."""
        return [] if self.folder is None else sorted(self.folder.glob("step-*.safetensors"))

    def _tidy(self) -> None:
        """Drop all but the newest checkpoints, and what a killed run left unfinished."""
        if self.folder is not None and self.accelerator.is_main_process:
            shutil.rmtree(self.folder / "unfinished", ignore_errors=True)
            for old in self._steps()[:-KEPT]:
                old.unlink(missing_ok=True)

    def _write(self, path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        """Write a file so that after a kill or a power cut it is there whole or not at all."""
        if not self.accelerator.is_main_process:
            return
        header = {"format": FORMAT, "run": self.run, **about}
        unfinished = path.parent / "unfinished"
        try:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
            save_file(dict(tensors), unfinished / path.name, {"palu": json.dumps(header)})
            _sync(unfinished / path.name)
            os.replace(unfinished / path.name, path)
            _sync(path.parent)
        except (OSError, SafetensorError) as error:
            existing = self._steps()
            intact = f"{existing[-1]} is intact" if existing else "there is no earlier one"
            raise CheckpointError(
                f"{path} could not be written: {error}; {intact}, and the model keeps the weights of its last step. "
                "Make room or mend the folder, load the starting model again and pass resume=True"
            ) from error
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)

    def _read(self, path: Path, *, tensors: bool = False) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """A file's tensors (if asked for) and header, having checked that it is whole and this run's.

        The tensors are mapped into memory, not read: clone what is kept longer than the file.
        """
        older = [p for p in self._steps() if p < path]
        if path.name.startswith("step-"):
            without = f"resume from {older[-1]}" if older else "start from the beginning"
        else:
            without = "have the reference asked again"
        try:
            with safe_open(path, "pt") as file:
                header = json.loads((file.metadata() or {}).get("palu", "null"))
                loaded = {name: file.get_tensor(name) for name in file.keys()} if tensors else {}  # noqa: SIM118
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        except (SafetensorError, ValueError) as error:
            raise CheckpointError(f"{path} is damaged ({error}); delete it to {without}") from error
        if not isinstance(header, dict):
            raise CheckpointError(f"{path} was not written by palu.unlearn; move it out of the folder to {without}")
        if header.get("format") != FORMAT:
            raise CheckpointError(
                f"{path} has format {header.get('format')}, and this palu reads {FORMAT}; "
                "resume with the palu that wrote it, or start anew in another checkpoint_dir"
            )
        if differences := compare(header["run"], self.run):
            raise CheckpointError(
                f"{path} belongs to another run: {'; '.join(differences)}. "
                "Pass what that run was started with, or another checkpoint_dir to start anew"
            )
        return loaded, header

    def _say(self, message: str) -> None:
        if self.accelerator.is_main_process:
            tqdm.write(f"palu: {message}", file=sys.stderr)


def describe_run(
    config: UnlearnConfig,
    accelerator: Accelerator,
    model: CausalLM,
    ref_model: CausalLM | None,
    forget: Sequence[Item],
    retain: Sequence[Item],
    everyday: Everyday,
) -> dict[str, Any]:
    """What must be the same on resume: values to compare, and fingerprints of what is too large to keep."""
    settings = {name: value for name, value in config.values().items() if name not in FREE}
    settings |= {
        "mixed_precision": accelerator.mixed_precision,
        "device": accelerator.device.type,
        "processes": accelerator.num_processes,
    }
    models = {
        "model": fingerprint_model(model),
        "ref_model": None if ref_model is None else fingerprint_model(ref_model),
        "choice of trainable parameters": _digest(sorted(_trainable(model))),
    }
    data = {
        "tokenised forget set": _digest(forget),
        "tokenised retain set": _digest(retain),
        "choice of everyday prompts": _digest(everyday.prompts),
    }
    # As JSON gives it back: numbers of NumPy become Python's.
    return json.loads(json.dumps({"settings": settings, "models": models, "data": data}, default=float))


def compare(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """What differs between two descriptions of a run, in words."""

    def differing(part: str) -> list[str]:
        return [name for name in saved[part] | current[part] if saved[part].get(name) != current[part].get(name)]

    old, new = saved["settings"], current["settings"]
    words = [f"{name} was {old.get(name)!r} and is {new.get(name)!r}" for name in differing("settings")]
    # Another setting also makes other items of the same data: then those say nothing.
    parts = ("models",) if words else ("models", "data")
    return words + [f"the {name} is another one" for part in parts for name in differing(part)]


def fingerprint_model(model: CausalLM) -> str:
    """SHA-256 of a model's weights and of its configuration, less where it was loaded from and by which version."""
    config = model.config.to_dict()
    for name in ("_name_or_path", "transformers_version"):
        config.pop(name, None)
    weights = dict(model.named_parameters()), dict(model.named_buffers())  # tied ones once
    return _digest([json.dumps(config, sort_keys=True, default=str), *weights])


def _digest(value: Any) -> str:
    """SHA-256 of nested lists, mappings and items of tensors, strings and numbers."""
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            digest.update(f"{value.dtype}{list(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        elif isinstance(value, Item):
            add(list(vars(value).values()))
        elif isinstance(value, Mapping):
            add([part for pair in value.items() for part in pair])
        elif isinstance(value, (list, tuple)):
            digest.update(f"({len(value)})".encode())
            for part in value:
                add(part)
        else:
            digest.update(f"{value!r},".encode())

    add(value)
    return digest.hexdigest()


def _trainable(model: CausalLM) -> dict[str, torch.nn.Parameter]:
    """The parameters that training changes, by name, in the optimizer's order; tied ones once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
