"""``palu.unlearn``: make a Llama forget chosen answers, and keep the rest."""

from __future__ import annotations

import math
import sys
import time
import types
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase, get_scheduler

from palu.adapter import CausalLM, base_of, inputs_with_gradients, is_peft
from palu.attention import using_packed_attention
from palu.baselines import OBJECTIVES
from palu.cache_file import cache_file
from palu.checkpoint import Checkpoints
from palu.config import UnlearnConfig
from palu.consult import consult
from palu.feed import Feed
from palu.fingerprint import Fingerprints
from palu.objective import Losses, Objective
from palu.packing import Batch
from palu.processes import accumulating, clip_gradients, put_together, start_engine, take_apart, together
from palu.sets import read_sets
from palu.trackers import tracking
from palu.validate import check_models


@dataclass(frozen=True)
class UnlearnResult:
    """What :func:`unlearn` returns."""

    model: CausalLM  # the one passed in, trained in place; with merge_adapter, its base with the adapter merged
    history: list[dict[str, float]]  # one record per optimisation step
    summary: dict[str, Any]  # counts, outcome, timing, versions and the configuration


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


def unlearn(
    model: CausalLM,
    ref_model: CausalLM | None,
    forget: Any,
    retain: Any,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    config: UnlearnConfig | None = None,
    **overrides: Any,
) -> UnlearnResult:
    """Make ``model`` forget the spans of the forget set (PALU, arXiv 2601.03190). The model is trained in place.

    Args:
        model: a ``LlamaForCausalLM``, or a causal LM whose logits are a linear head of its last hidden states; or a
            ``peft.PeftModel`` of one with a LoRA adapter, of which only the adapter is trained.
        ref_model: the frozen reference; ``None``: ``model`` as it is now, without a second copy of its body; for a
            ``PeftModel`` the model without its adapter. An adapter that has learnt something before is so pulled
            back to a model that never learnt it; to keep that, merge the adapter and add a new one first.
        forget: examples with ``spans``: a path to JSONL, CSV or Parquet, a list of dicts, a ``datasets.Dataset``, or
            tokenised tensors; see :mod:`palu.data`. An example without a span is held by the KL alone.
        retain: examples to keep by cross-entropy, in the same forms. Beside them, or for ``None`` alone, PALU keeps
            what the reference itself answers to everyday prompts, by the KL (:mod:`palu.anchors`, and ``anchors`` in
            the settings). ``[]``, and for another objective ``None``: nothing, which needs ``lambda_retain=0``.
        tokenizer: a fast tokenizer; not needed for tokenised input, but for anchors.
        config: the settings; ``overrides`` replace single fields of it.

    Returns:
        :class:`UnlearnResult`. Each record of ``history`` holds step, epoch, loss, local, kl, retain (for another
        objective its own terms), grad_norm, learning_rate, tokens, tokens_per_second, and onset_probability where
        ``stop_probability`` is set.

    Raises:
        DataError: the data cannot be used; the message names the row and the mend.
        ValueError, TypeError: a setting, the models or the tokenizer do not fit.
        DivergenceError: a loss or the gradient norm became NaN or inf.
        CacheError: the reference's answers cannot be written to ``cache_dir``, or what is there cannot be used.
        CheckpointError: a checkpoint cannot be written, or is not one of this run.
        ImportError: a tracker's package is missing.
    """
    if not isinstance(config, UnlearnConfig | None):
        raise TypeError(f"config is a {type(config).__name__}; give a palu.UnlearnConfig, or its fields as arguments")
    config = (config or UnlearnConfig()).replace(**overrides)
    method = OBJECTIVES[config.objective]
    accelerator = start_engine(config)
    with together(accelerator):
        check_models(model, ref_model, tokenizer, accelerator.device, accelerator.mixed_precision)
        if config.merge_adapter and not is_peft(model):
            raise ValueError(
                f"merge_adapter = True: model is a {type(model).__name__}, which has no adapter; leave it out"
            )

        # Text to tokens with roles. Every complaint about the data comes before anything is changed.
        to_forget, to_retain, everyday, counted = read_sets(
            model, ref_model, forget, retain, tokenizer, config, accelerator.num_processes
        )

        # With resume, the newest checkpoint is this run's, or an error says what differs.
        fingerprints = Fingerprints(model, ref_model, to_forget, to_retain, everyday)
        file = cache_file(config, method.depends_on(config), accelerator, fingerprints)
        checkpoints = Checkpoints(config, accelerator, model, fingerprints, file)

    set_seed(config.seed, device_specific=True)
    progress = config.progress and accelerator.is_main_process
    started = time.perf_counter()
    model.to(accelerator.device)
    # The reference speaks once; then at most its head is needed.
    reference = ref_model if ref_model is not None else model
    cache, ref_head = consult(
        reference, model, to_forget, everyday, method, config, accelerator, file=file, progress=progress
    )
    with ready_to_train(model, config, accelerator), checkpoints, tracking(accelerator, config):
        trained = take_apart(model, accelerator)
        objective = method(trained, ref_head, config)
        optimizer = torch.optim.AdamW(
            [p for p in trained.parameters() if p.requires_grad],
            config.learning_rate,
            weight_decay=config.weight_decay,
            fused=accelerator.device.type in ("cpu", "cuda"),
        )
        objective, optimizer = accelerator.prepare(objective, optimizer)
        parameters = [p for p in trained.parameters() if p.requires_grad]  # those that an engine has sharded
        feed = Feed(
            to_forget,
            to_retain,
            cache,
            config,
            process_index=accelerator.process_index,
            num_processes=accelerator.num_processes,
            pin_memory=accelerator.device.type == "cuda",
        )
        scheduler = get_scheduler(config.lr_scheduler, optimizer, config.warmup_steps, config.epochs * len(feed))

        history = checkpoints.restore(trained, optimizer, scheduler, accelerator.unwrap_model(objective))
        bar = tqdm(total=config.epochs * len(feed), initial=len(history), desc="unlearn", disable=not progress)
        clock = time.perf_counter()
        for epoch in range(feed.skip(len(history)), config.epochs + 1):
            for batches in feed:
                # Exact means over the whole step: its counts come before its first micro-batch.
                counts = add_up([batch.counts for batch in batches], accelerator)
                outputs = []
                for batch in batches:
                    with accumulating(objective, accelerator, last=batch is batches[-1]):
                        with accelerator.autocast():
                            losses = objective(batch.to(accelerator.device), counts)
                        # Data-parallel engines average gradients over processes; the loss wants their sum.
                        accelerator.backward(losses.total * accelerator.num_processes)
                    outputs.append(losses)
                grad_norm = clip_gradients(objective, parameters, config.max_grad_norm, accelerator)

                record: dict[str, float] = {"step": len(history) + 1, "epoch": epoch}
                record |= read_back(batches, outputs, grad_norm, method, config, accelerator)
                if not all(map(math.isfinite, record.values())):
                    bar.close()
                    optimizer.zero_grad()
                    put_together(model, trained, accelerator)
                    raise DivergenceError(record, history)
                optimizer.step()
                record |= accelerator.unwrap_model(objective).after_step(record)
                record["learning_rate"] = scheduler.get_last_lr()[0]
                scheduler.step()
                optimizer.zero_grad()

                clock, before = time.perf_counter(), clock
                record["tokens_per_second"] = record["tokens"] / (clock - before)
                history.append(record)
                accelerator.log(record, step=record["step"])
                bar.update()
                bar.set_postfix({name: f"{record[name]:.3g}" for name in method.terms})
                checkpoints.after_step(history)
                clock = time.perf_counter()  # writing is no part of the next step
            if config.stop_probability is not None and config.stop_probability > max(
                r["onset_probability"] for r in history if r["epoch"] == epoch
            ):
                break
        checkpoints.save(history)
        put_together(model, trained, accelerator)
        bar.close()

    summary = {
        **counted,
        "anchors": len(cache.anchors),
        "anchors_skipped": len(everyday.prompts) - len(cache.anchors),
        "steps": len(history),
        "epochs": epoch,
        "stopped_early": epoch < config.epochs,
        "seconds": time.perf_counter() - started,
        "device": str(accelerator.device),
        "processes": accelerator.num_processes,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "config": config.values(),
    }
    if config.merge_adapter:
        unlearned: Any = model.merge_and_unload()  # type: ignore[operator]
        return UnlearnResult(unlearned, history, summary)
    return UnlearnResult(model, history, summary)


@contextmanager
def ready_to_train(model: CausalLM, config: UnlearnConfig, accelerator: Accelerator) -> Iterator[None]:
    """Training mode, packed attention, gradient checkpointing as configured; all are put back on leaving."""
    training, base = model.training, base_of(model)
    checkpointed = any(getattr(m, "gradient_checkpointing", False) for m in base.modules())
    switch = config.gradient_checkpointing and not checkpointed
    # transformers 5 is renaming gradient checkpointing to activation checkpointing.
    name = "activation" if hasattr(base, "activation_checkpointing_enable") else "gradient"
    model.train()
    with (
        inputs_with_gradients(base) if switch or checkpointed else nullcontext(),
        using_packed_attention(base, accelerator.mixed_precision),
    ):
        if switch:
            getattr(base, f"{name}_checkpointing_enable")({"use_reentrant": False})
        try:
            yield
        finally:
            if switch:
                getattr(base, f"{name}_checkpointing_disable")()
            model.train(training)


def add_up(counts: list[tuple[int, int, int, int]], accelerator: Accelerator) -> Tensor:
    """[4], int64: the counts of all micro-batches of all processes."""
    return accelerator.reduce(torch.tensor(counts, device=accelerator.device).sum(0), "sum")


def read_back(
    batches: list[Batch],
    outputs: list[Losses],
    grad_norm: Tensor,
    method: type[Objective],
    config: UnlearnConfig,
    accelerator: Accelerator,
) -> dict[str, float]:
    """The figures of a step of all processes, in the one read-back from the accelerator that a step costs."""
    sums = torch.stack([torch.cat([losses.total.detach()[None], losses.terms]) for losses in outputs]).sum(0)
    tokens = sums.new_tensor([sum(sum(batch.packed.sequence_lengths) for batch in batches)])
    names = ["loss", *method.terms, "tokens", "grad_norm"]
    figures = [*accelerator.reduce(torch.cat([sums, tokens]), "sum"), grad_norm]
    if config.stop_probability is not None:
        highest = torch.stack([losses.highest_probability for losses in outputs]).max()
        names.append("onset_probability")
        figures.append(accelerator.gather(highest).max())
    return dict(zip(names, torch.stack([f.float() for f in figures]).tolist(), strict=True))


class _CallableModule(types.ModuleType):
    """Importing this submodule puts it where ``palu.unlearn(...)`` is looked up, so it can be called as well."""

    __call__ = staticmethod(unlearn)


sys.modules[__name__].__class__ = _CallableModule
