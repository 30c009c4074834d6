"""Evaluations within a run, and callbacks of transformers: what they are told, and what they may ask for.

All processes call every callback, and run every evaluation; what a callback asks for on one of them is done on all.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import ExportableState, PrinterCallback

from palu.config import UnlearnConfig
from palu.distributed import ProcessError, autocast, gather_values, raise_on_all_ranks
from palu.models.attention import use_own_attention
from palu.models.generation import eval_mode
from palu.models.lora import CausalLM, base_of
from palu.settings import EVAL_PREFIX
from palu.training.asking import ask
from palu.training.checkpoint import CheckpointError
from palu.training.step import Run, check_watched, enough_forgotten, losses_text

Evaluate = Callable[[CausalLM], Mapping[str, float]]

CALLED = ("train_begin", "epoch_begin", "step_begin", "step_end", "log", "evaluate", "save", "epoch_end", "train_end")
EVENTS = {f"on_{name}" for name in CALLED}
REQUESTS = ("should_training_stop", "should_evaluate", "should_save")
LINES = 40
# The only classes of transformers' own that read nothing of TrainingArguments.
_WITHOUT_ARGUMENTS = {TrainerCallback, ExportableState, PrinterCallback}


def check_callbacks(callbacks: Any, evaluate: Any, config: UnlearnConfig) -> None:
    """Raise TypeError or ValueError where callbacks or an evaluation cannot be called; warn of what never is."""
    if evaluate is not None and not callable(evaluate):
        raise TypeError(
            f"evaluate is a {type(evaluate).__name__}; give a function that takes the model and returns numbers by name"
        )
    if config.eval_steps is not None and evaluate is None:
        raise ValueError(f"eval_steps = {config.eval_steps}: there is nothing to evaluate; give evaluate, too")
    if not isinstance(callbacks, list | tuple):
        raise TypeError(f"callbacks is a {type(callbacks).__name__}; give a list of transformers.TrainerCallback")
    for number, callback in enumerate(callbacks):
        name = f"callbacks[{number}]"
        if isinstance(callback, type):
            raise TypeError(f"{name} is the class {callback.__name__}; give an instance of it: {callback.__name__}()")
        kind = type(callback)
        if not isinstance(callback, TrainerCallback):
            raise TypeError(f"{name} is a {kind.__name__}; give an instance of a transformers.TrainerCallback")
        for base in set(kind.__mro__) - _WITHOUT_ARGUMENTS:
            if base.__module__.startswith("transformers."):
                raise TypeError(
                    f"{name} is transformers' {base.__name__}, which goes by Trainer's arguments; leave it out and "
                    "write a TrainerCallback (docs/unlearn.md), or set report_to for a tracker"
                )
        if never := sorted(_overridden(callback) - EVENTS):
            warnings.warn(f"{name}: palu.unlearn never calls {', '.join(never)} of {kind.__name__}", stacklevel=3)


class TrainingEvents:
    """Calls the callbacks of one run as ``transformers.Trainer`` does, and does what they ask for."""

    def __init__(
        self,
        run: Run,
        callbacks: Sequence[TrainerCallback],
        evaluate: Evaluate | None,
        tokenizer: PreTrainedTokenizerBase | None,
        *,
        progress: bool,
    ):
        self.run, self.callbacks, self.evaluate = run, callbacks, evaluate
        self.accelerator, self.checkpoints, self.history = run.accelerator, run.checkpoints, run.history
        self.given = {
            "model": run.root.model,
            "processing_class": tokenizer,
            "optimizer": run.optimizer,
            "lr_scheduler": run.scheduler,
            "train_dataloader": run.loader,
            "eval_dataloader": None,
        }
        self.control = TrainerControl()
        self.state = TrainerState(
            global_step=len(run.history),
            epoch=len(run.history) / len(run.loader),
            max_steps=run.total_steps,
            num_train_epochs=-(-run.total_steps // len(run.loader)),
            logging_steps=1,
            eval_steps=run.config.eval_steps,  # type: ignore[arg-type]
            train_batch_size=run.config.batch_size,
            log_history=run.history,
            is_local_process_zero=run.accelerator.is_local_main_process,
            is_world_process_zero=run.accelerator.is_main_process,
        )
        own = set().union(*map(_overridden, callbacks)) & EVENTS
        self.used_events = set().union(*gather_values(own, run.accelerator))  # by a callback of any process
        self.last_saved = run.checkpoints.saved  # what the last checkpoint held that on_save was called for
        self.bar = tqdm(total=run.total_steps, initial=len(run.history), desc="unlearn", disable=not progress)
        self.clock = 0.0  # from which the next step's seconds count

    @contextmanager
    def around_run(self) -> Iterator[None]:
        """Begin the run with an evaluation, where that is still due; end it with one, and with a checkpoint."""
        try:
            self.call("on_train_begin")
            self._do_requests()
            yield
            self._evaluate()
            self._save()
            self._call_on_save()
            self.call("on_train_end")
        finally:
            self.bar.close()

    @property
    def steps_left(self) -> int:
        """Optimisation steps that the run still has."""
        return 0 if self.checkpoints.ended_by else self.run.total_steps - len(self.history)

    def begin_epoch(self) -> None:
        """Begin an epoch; what was done since the last one is no part of its first step."""
        self.call("on_epoch_begin")
        self.clock = time.perf_counter()

    def begin_step(self) -> None:
        """Begin an optimisation step."""
        self.control.should_evaluate = self.control.should_save = False
        self.call("on_step_begin")

    def end_step(self) -> None:
        """End the step whose record is the last of the history: log it, evaluate and write a checkpoint where due."""
        record, now = self.history[-1], time.perf_counter()
        record["tokens_per_second"] = record["tokens"] / (now - self.clock)
        self.accelerator.log(record, step=int(record["step"]))
        self.bar.update()
        self.bar.set_postfix({name: f"{record[name]:.3g}" for name in self.run.root.terms})
        self.state.global_step = len(self.history)
        self.state.epoch = len(self.history) / len(self.run.loader)
        self.call("on_step_end")
        self.call("on_log", logs=dict(self.history[-1]))
        self._do_requests()
        self.checkpoints.after_step(self.history)
        self._call_on_save()
        self.clock = time.perf_counter()  # what was done since the step is no part of the next one

    def end_epoch(self) -> None:
        """End an epoch, and the run where it has forgotten enough."""
        self.call("on_epoch_end")
        self._do_requests()
        if self.steps_left:
            watched = check_watched(self.run)
            if enough_forgotten(self.history, len(self.run.loader), self.run.root, watched) and not ask(self.run):
                self.checkpoints.ended_by = "forgotten"

    def _do_requests(self) -> None:
        """Evaluate where that is due; evaluate, end the run and write a checkpoint where a callback asked for it."""
        save, self.control.should_save = self.control.should_save, False
        taken, every = len(self.history), self.run.config.eval_steps
        if self.control.should_evaluate or taken == 0 or (every is not None and taken % every == 0):
            self._evaluate()
        if self.control.should_training_stop and taken and self.steps_left:
            self.checkpoints.ended_by = "callback"
        if save or self.control.should_save:
            self._save()
            self._call_on_save()

    def _save(self) -> None:
        """Write a checkpoint; where that fails, the model keeps its weights (all processes raise)."""
        try:
            self.checkpoints.save(self.history)
        except (CheckpointError, ProcessError):
            self.run.give_weights_back()
            raise

    def _call_on_save(self) -> None:
        """Call ``on_save`` where a checkpoint was written since the last call."""
        if self.checkpoints.saved != self.last_saved:
            self.last_saved = self.checkpoints.saved
            self.call("on_save")

    def _evaluate(self) -> None:
        """Evaluate after the last step, if that was not done; the metrics join its record, or are those before all."""
        self.control.should_evaluate = False
        record = self.history[-1] if self.history else self.checkpoints.evaluation_before
        if self.evaluate is None or any(name.startswith(EVAL_PREFIX) for name in record):
            return
        with self._saved_on_error(), raise_on_all_ranks(self.accelerator):
            metrics = self._metrics(self.evaluate)
        metrics = gather_values(metrics, self.accelerator)[0]
        record |= metrics
        self.accelerator.log(metrics, step=len(self.history))
        self.call("on_evaluate", metrics=dict(metrics))

    def _metrics(self, evaluate: Evaluate) -> dict[str, float]:
        """Call the evaluation on the model as it is outside training; after it, all goes on as if it had not been."""
        model, device = self.run.root.model, self.accelerator.device
        with (
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            torch.no_grad(),
            autocast(self.accelerator),
            use_own_attention(base_of(model)),
            eval_mode(base_of(model)),
        ):
            given: Any = self.run.root.run(lambda: evaluate(model))
        if not isinstance(given, Mapping):
            raise TypeError(f"evaluate returned a {type(given).__name__}; return a mapping of names to numbers")
        metrics = {}
        for name, value in given.items():
            try:
                metrics[name if str(name).startswith(EVAL_PREFIX) else f"{EVAL_PREFIX}{name}"] = float(value)
            except (TypeError, ValueError):
                raise TypeError(f"evaluate returned {name!r}: {value!r}; return a number for each name") from None
        return metrics

    def call(self, event: str, **given: Any) -> None:
        """Call an event of all callbacks; what one asks for on any process, it has asked for on all."""
        if event not in self.used_events:
            return
        model = self.run.root.model
        with self._saved_on_error(), raise_on_all_ranks(self.accelerator):
            with use_own_attention(base_of(model)):
                for callback in self.callbacks:
                    control = getattr(callback, event)(self.run.config, self.state, self.control, **self.given, **given)
                    if not isinstance(control, TrainerControl | None):
                        kind = type(control).__name__
                        raise TypeError(f"{event} of a callback returned a {kind}; return control, or nothing")
                    self.control = control or self.control
            model.train()
            self._check_requests(event)
        requests = gather_values([getattr(self.control, request) for request in REQUESTS], self.accelerator)
        for request, of_all in zip(REQUESTS, zip(*requests, strict=True), strict=True):
            setattr(self.control, request, any(of_all))

    def _check_requests(self, event: str) -> None:
        """Raise ValueError where a callback asks for what cannot be done."""
        if self.control.should_epoch_stop:
            raise ValueError(
                f"{event} of a callback set should_epoch_stop, and a run cannot leave a part of an epoch out; "
                "set should_training_stop"
            )
        if self.control.should_evaluate and self.evaluate is None:
            raise ValueError(f"{event} of a callback set should_evaluate; give evaluate to palu.unlearn, too")
        if self.control.should_save and self.checkpoints.folder is None:
            raise ValueError(f"{event} of a callback set should_save; give checkpoint_dir to palu.unlearn, too")

    @contextmanager
    def _saved_on_error(self) -> Iterator[None]:
        """Give the weights back and write a checkpoint before an error leaves, which all processes raise."""
        try:
            yield
        except Exception:
            self.run.give_weights_back()
            self.checkpoints.save(self.history)
            raise


class LossLines(TrainerCallback):
    """Prints the losses of at most LINES steps, evenly apart, and of the last one."""

    printed = 0  # the last of these steps

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        left, apart = state.max_steps - state.global_step, -(-state.max_steps // LINES)
        if left % apart == 0:
            self._print(state, kwargs["logs"])

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.printed != state.global_step:  # the run ended early
            self._print(state, state.log_history[-1])

    def _print(self, state: TrainerState, record: Mapping[str, float]) -> None:
        self.printed = state.global_step
        if state.is_world_process_zero:
            print(f"step {state.global_step} of {state.max_steps}: {losses_text(record)}", flush=True)


def _overridden(callback: TrainerCallback) -> set[str]:
    """Return the events that a callback does something at."""
    events = (name for name in vars(TrainerCallback) if name.startswith("on_"))
    return {name for name in events if getattr(type(callback), name) is not getattr(TrainerCallback, name)}
