"""An optimisation step: forward and backward of its micro-batches, its record, and the step of the optimizer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from palu.config import UnlearnConfig
from palu.data.packing import Batch, Counts
from palu.distributed import autocast, full_tensor, gather_values
from palu.eager import acc_dtype
from palu.methods import Method
from palu.methods.base import FEWEST_STEPS, Losses, MethodSettings
from palu.models.generation import eval_mode
from palu.models.lora import CausalLM, base_of
from palu.training.checkpoint import Checkpoints, History
from palu.training.dataloader import UnlearnDataLoader
from palu.training.datasets import RunData
from palu.training.engine import copy_weights_back
from palu.training.optimizer import clip_gradients

FIRST_STEP = 2 / 3  # of the forget loss is what the first step takes off, to first order, where no rate is given
MOST_NATS = 1.0  # of it: it is high for what is known by heart, where a rate in proportion breaks more


class DivergenceError(RuntimeError):
    """A loss or the gradient norm was NaN or inf; the model keeps the weights of the last good step.

    Attributes:
        step: the optimisation step (counted from 1) that was not taken.
        history: the records of the steps that were.
    """

    def __init__(self, record: dict[str, float], history: list[dict[str, float]]):
        bad = ", ".join(f"{k} = {v}" for k, v in record.items() if not math.isfinite(v))
        super().__init__(
            f"step {record['step']}: {bad}; the model keeps the weights of step {record['step'] - 1}. "
            "Lower the learning rate, or look at the model and the data of this step"
        )
        self.step, self.history = record["step"], history


@dataclass
class Run:
    """A run in progress: what its steps work on."""

    data: RunData
    accelerator: Accelerator
    model: CausalLM  # the one passed in
    trained: CausalLM  # what is trained: the model, or an engine's copy of it
    method: Any  # the method as the engine has wrapped it
    root: Method  # the method itself
    loader: UnlearnDataLoader
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    checkpoints: Checkpoints
    history: History  # a record for each step that was taken
    asks: bool  # whether the model is asked before the run ends, for which its reference must run again

    @property
    def config(self) -> UnlearnConfig:
        return self.data.config

    @property
    def total_steps(self) -> int:
        """Optimisation steps of the run, if nothing ends it early."""
        return self.config.total_steps(len(self.loader))

    @property
    def rate(self) -> float:
        """The learning rate, but for warm-up and schedule; 0 while it is still to be chosen."""
        return float(self.scheduler.base_lrs[0])

    def give_weights_back(self) -> None:
        """Give the model the weights that have been trained; all processes must call it."""
        copy_weights_back(self.model, self.trained, self.accelerator)


def train_step(run: Run, batches: Sequence[Batch], epoch: int) -> dict[str, float]:
    """Take an optimisation step on this process's micro-batches; return its record.

    Raises DivergenceError where a figure is not finite: the step is not taken.
    """
    accelerator = run.accelerator
    # Exact means over the whole step: its counts come before its first micro-batch.
    counts = sum_counts([batch.counts for batch in batches], accelerator)
    outputs = [forward_backward(run.method, batch, counts, accelerator, last=batch is batches[-1]) for batch in batches]
    parameters = [p for p in run.trained.parameters() if p.requires_grad]  # those that an engine has sharded
    norm1 = None if run.rate else gradient_norm1(parameters)
    grad_norm = clip_gradients(run, parameters)
    try:
        figures = step_figures(batches, outputs, grad_norm, run.root, accelerator, run.history)
    except DivergenceError:
        run.optimizer.zero_grad()
        run.give_weights_back()
        raise
    if norm1 and (fall := first_fall(figures, run.root)):
        set_rate(run.optimizer, run.scheduler, fall / norm1)
    if not run.rate:
        run.optimizer.zero_grad()  # so that the optimizer does nothing: no moment changes
    run.optimizer.step()
    record: dict[str, float] = {"step": figures.pop("step"), "epoch": epoch, **figures}
    record["learning_rate"] = float(run.scheduler.get_last_lr()[0])
    if run.loader.earlier:
        record["earlier"] = sum(number in run.loader.earlier for number in run.loader.returned)
    run.scheduler.step()
    run.optimizer.zero_grad()
    return record


@torch.no_grad()
def check_watched(run: Run) -> float:
    """Choose what of the watched takes part in the next epoch; return the highest probability in all of it.

    It is what has a token above the floor (its loss is 0 elsewhere). All processes must call it: each looks at a share,
    and all choose the same.
    """
    loader, accelerator = run.loader, run.accelerator
    if not loader.watched:
        return 0.0
    ones = to_device([1] * len(Counts._fields), accelerator)

    def highest_of(batch: Batch) -> list[float]:
        losses: Any = run.root.batch_losses(batch, ones).of_targets
        items = losses.new_zeros(len(batch.packed.sequence_lengths))
        return (-items.scatter_reduce(0, batch.item, losses, "amax").neg().expm1()).tolist()

    found: dict[int, float] = {}
    with eval_mode(base_of(run.trained)), autocast(accelerator):
        for numbers, batch in loader.watched_batches():
            on_device = batch.to(accelerator.device)
            found |= zip(numbers, run.root.run(partial(highest_of, on_device)), strict=False)  # perhaps an idle one's
    of_all = {number: p for part in gather_values(found, accelerator) for number, p in part.items()}
    loader.returned = run.checkpoints.returned = sorted(number for number, p in of_all.items() if p > 0)
    return max(of_all.values())


def sum_counts(counts: Sequence[Counts], accelerator: Accelerator) -> Tensor:
    """Sum the counts of all micro-batches of all processes: int64 [4], in the order of their fields."""
    return accelerator.reduce(to_device([sum(of_all) for of_all in zip(*counts, strict=True)], accelerator), "sum")


def to_device(numbers: Sequence[int], accelerator: Accelerator) -> Tensor:
    """Copy numbers to the accelerator's device, int64, without waiting for what it still has to do."""
    values = torch.tensor(numbers)
    pinned = values.pin_memory() if accelerator.device.type == "cuda" else values
    return pinned.to(accelerator.device, non_blocking=True)


def losses_text(record: Mapping[str, float]) -> str:
    """Say the losses of a step's record, and what was evaluated after it: "loss 0.5, local 0.4, ..."."""
    others = ("step", "epoch", "tokens", "tokens_per_second", "grad_norm", "learning_rate")
    return ", ".join(f"{name} {value:.3g}" for name, value in record.items() if name not in others)


def gradient_norm1(parameters: Sequence[nn.Parameter]) -> float:
    """Return the 1-norm of the gradient. All processes must call it.

    AdamW's first step moves every weight by the rate, so to first order it takes rate times this off the loss.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    norms = [torch.linalg.vector_norm(grad, 1, dtype=acc_dtype(grad.dtype)) for grad in grads]
    return float(sum(full_tensor(norm) for norm in norms))  # one wait for the device


def first_fall(figures: Mapping[str, float], method: Method) -> float:
    """Return what the first step is to take off the loss, to first order; 0 where there is nothing to forget.

    The retain loss is no part of it: for texts that the model does not know it is high, and would raise the rate.
    """
    forget, settings = abs(figures[method.terms[0]]), method.settings
    if settings.gamma == 0:
        return FIRST_STEP * figures["loss"]
    return settings.gamma * min(FIRST_STEP * forget, MOST_NATS if settings.in_nats else math.inf)


def set_rate(optimizer: torch.optim.Optimizer, scheduler: torch.optim.lr_scheduler.LRScheduler, rate: float) -> None:
    """Give the optimizer a learning rate, as if the run had begun with it."""
    schedule: Any = scheduler
    (factor,) = schedule.lr_lambdas
    schedule.base_lrs, schedule._last_lr = [rate], [rate * factor(schedule.last_epoch)]
    optimizer.param_groups[0] |= {"initial_lr": rate, "lr": schedule._last_lr[0]}


def forward_backward(
    module: nn.Module, batch: Batch, counts: Tensor, accelerator: Accelerator, *, last: bool
) -> Losses:
    """Run forward and backward of a micro-batch; after the step's ``last`` one the engine sums the gradients.

    ``counts``: of the whole step; see :meth:`palu.methods.Method.batch_losses`.
    """
    # DeepSpeed clips and takes its step within the last backward pass; if a gradient is not finite it takes none.
    accelerator.sync_gradients = last
    with nullcontext() if last else accelerator.no_sync(module):
        with accelerator.autocast():
            losses: Losses = module(batch.to(accelerator.device), counts)
        # Data-parallel engines average gradients over processes; the loss wants their sum.
        accelerator.backward(losses.total * accelerator.num_processes)
    return losses


def step_figures(
    batches: Sequence[Batch],
    outputs: Sequence[Losses],
    grad_norm: Tensor,
    method: Method,
    accelerator: Accelerator,
    history: History,
) -> dict[str, float]:
    """Gather a step's figures from all processes, in the one read-back from the accelerator that a step costs.

    It comes before the optimizer's step, behind which the host then has the record, the next batch and its launches.
    They are step, loss, the method's terms, tokens, grad_norm, and onset_probability where it can end the run. Raises
    DivergenceError where one of them is not finite.
    """
    sums = torch.stack([torch.cat([losses.total.detach()[None], losses.terms]) for losses in outputs]).sum(0)
    tokens = to_device([sum(batch.packed.tokens for batch in batches)], accelerator).to(sums.dtype)
    names = ["loss", *method.terms, "tokens", "grad_norm"]
    figures = [*accelerator.reduce(torch.cat([sums, tokens]), "sum"), grad_norm]
    of_targets = [losses.of_targets for losses in outputs if losses.of_targets is not None]
    if of_targets:
        names.append("onset_probability")
        highest = torch.cat([of_targets[0].new_zeros(1), *of_targets]).max()
        figures.append(accelerator.gather(-highest.neg().expm1().float()).max())
    values = torch.stack([figure.float() for figure in figures]).tolist()
    record = {"step": len(history) + 1, **dict(zip(names, values, strict=True))}
    if not all(map(math.isfinite, values)):
        raise DivergenceError(record, history)
    return record


def enough_forgotten(history: History, steps_per_epoch: int, method: Method, watched: float = 0.0) -> bool:
    """Say after an epoch whether the run need not go on.

    It has forgotten when in two epochs running all probabilities stay below the method's ``ends_below`` (PALU: those
    among the candidates), that of what is ``watched`` (the highest) is below it, too, and FEWEST_STEPS have been taken.
    """
    limit = method.settings.ends_below
    two_epochs = history[-2 * steps_per_epoch :]
    return (
        limit is not None
        and watched < limit
        and len(history) >= max(2 * steps_per_epoch, FEWEST_STEPS)
        and all(record["onset_probability"] < limit for record in two_epochs)
    )


def ending(history: History, ended_by: str | None, settings: MethodSettings, *, neighbours: int | None) -> str:
    """Say in a line how a run ended, and what to do where it did not get there.

    ``neighbours``: how many the reference wrote; None: none were wanted.
    """
    steps, limit, epoch = len(history), settings.ends_below, history[-1]["epoch"]
    highest = max((r["onset_probability"] for r in history if r["epoch"] == epoch and limit is not None), default=0.0)
    said = f"palu: {steps} step{'s' * (steps != 1)}"
    if ended_by == "forgotten":
        said += f"; no token to be forgotten is above {limit:g} among its candidates any more"
    elif ended_by is None and limit is not None:
        said += ", the most it may take; in the last epoch the likeliest token to be forgotten had "
        said += f"{highest:.2g} among its candidates"
        said += "; allow more epochs, or raise the learning rate" * (highest >= limit)
    elif ended_by is not None:
        said += f"; ended by {ended_by}"
    if neighbours == 0:
        said += ". The reference wrote no question like those to be forgotten: give such rows as a retain set"
    return said
