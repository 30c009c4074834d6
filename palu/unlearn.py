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

from palu.adapter import CausalLM, base_of, is_peft, without_adapter
from palu.attention import using_packed_attention
from palu.baselines import OBJECTIVES
from palu.cache import ReferenceCache, build_cache
from palu.checkpoint import Checkpoints
from palu.config import UnlearnConfig
from palu.data import load_alternates, load_forget, load_retain
from palu.feed import Feed
from palu.losses import Head
from palu.objective import Losses, Objective, body_of, head_of
from palu.packing import Item, retain_items
from palu.validate import check_linear_head, check_models, check_sets


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
        forget: examples with ``spans``: a path to JSONL, a list of dicts, a ``datasets.Dataset``, or tokenised
            tensors; see :mod:`palu.data`. An example without a span is held by the KL alone.
        retain: examples to keep by cross-entropy, in the same forms; ``None`` or empty needs ``lambda_retain=0``.
        tokenizer: a fast tokenizer; not needed for tokenised input.
        config: the settings; ``overrides`` replace single fields of it.

    Returns:
        :class:`UnlearnResult`. Each record of ``history`` holds step, epoch, loss, local, kl, retain (for another
        objective its own terms), grad_norm, learning_rate, tokens, tokens_per_second, and onset_probability where
        ``stop_probability`` is set.

    Raises:
        DataError: the data cannot be used; the message names the row and the mend.
        ValueError, TypeError: a setting, the models or the tokenizer do not fit.
        DivergenceError: a loss or the gradient norm became NaN or inf.
        CheckpointError: a checkpoint cannot be written, or is not one of this run.
    """
    config = (config or UnlearnConfig()).replace(**overrides)
    method = OBJECTIVES[config.objective]
    accelerator = Accelerator()
    check_models(model, ref_model, tokenizer, accelerator)
    if config.merge_adapter and not is_peft(model):
        raise ValueError(f"merge_adapter = True: model is a {type(model).__name__}, which has no adapter; leave it out")

    # Text to tokens with roles. Every complaint about the data comes before anything is changed.
    forget = list(forget) if isinstance(forget, Iterator) else forget  # alternate answers are read in a second pass
    forget_set = load_forget(forget, tokenizer, max_length=config.max_length)
    retain_set = load_retain(retain if retain is not None else [], tokenizer, max_length=config.max_length)
    check_sets(model, forget_set, retain_set, config)
    alternates = (
        load_alternates(forget, tokenizer, forget_set.examples, max_length=config.max_length)
        if method.needs_alternates
        else []
    )
    to_forget = method.items(forget_set.examples, alternates, config, tokenizer.eos_token_id if tokenizer else None)
    to_retain = retain_items(retain_set.examples) if method.retains(config) else []
    for candidate in (model,) if ref_model is None else (model, ref_model):
        check_linear_head(candidate, to_forget[0].input_ids)

    # With resume, the newest checkpoint is this run's, or an error says what differs.
    checkpoints = Checkpoints(config, accelerator, model, ref_model, to_forget, to_retain)

    set_seed(config.seed)
    progress = config.progress and accelerator.is_local_main_process
    started = time.perf_counter()
    model.to(accelerator.device)
    with ready_to_train(model, config, accelerator), checkpoints:
        # The reference speaks once; then at most its head is needed.
        reference = ref_model if ref_model is not None else model
        known = checkpoints.reference()
        cache, ref_head = consult(reference, model, to_forget, method, config, accelerator, progress, known)
        if known is None:
            checkpoints.keep_reference(cache)

        objective = method(model, ref_head, config)
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            parameters,
            config.learning_rate,
            weight_decay=config.weight_decay,
            fused=accelerator.device.type in ("cpu", "cuda"),
        )
        objective, optimizer = accelerator.prepare(objective, optimizer)
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

        history = checkpoints.restore(model, optimizer, scheduler, accelerator.unwrap_model(objective))
        bar = tqdm(total=config.epochs * len(feed), initial=len(history), desc="unlearn", disable=not progress)
        clock = time.perf_counter()
        for epoch in range(feed.skip(len(history)), config.epochs + 1):
            for batches in feed:
                # Exact means over the whole step: its counts come before its first micro-batch.
                counts = add_up([batch.counts for batch in batches], accelerator)
                outputs = []
                for batch in batches:
                    sync = nullcontext() if batch is batches[-1] else accelerator.no_sync(objective)
                    with sync:
                        with accelerator.autocast():
                            losses = objective(batch.to(accelerator.device), counts)
                        # Data-parallel engines average gradients over processes; the loss wants their sum.
                        accelerator.backward(losses.total * accelerator.num_processes)
                    outputs.append(losses)
                grad_norm = accelerator.clip_grad_norm_(parameters, config.max_grad_norm)

                record: dict[str, float] = {"step": len(history) + 1, "epoch": epoch}
                record |= read_back(outputs, grad_norm, method, config, accelerator)
                if not all(map(math.isfinite, record.values())):
                    bar.close()
                    optimizer.zero_grad()
                    raise DivergenceError(record, history)
                optimizer.step()
                record |= accelerator.unwrap_model(objective).after_step(record)
                record["learning_rate"] = scheduler.get_last_lr()[0]
                scheduler.step()
                optimizer.zero_grad()

                clock, before = time.perf_counter(), clock
                record["tokens"] = sum(sum(batch.packed.sequence_lengths) for batch in batches)
                record["tokens_per_second"] = record["tokens"] / (clock - before)
                history.append(record)
                bar.update()
                bar.set_postfix({name: f"{record[name]:.3g}" for name in method.terms})
                checkpoints.after_step(history)
                clock = time.perf_counter()  # writing is no part of the next step
            if config.stop_probability is not None and config.stop_probability > max(
                r["onset_probability"] for r in history if r["epoch"] == epoch
            ):
                break
        checkpoints.save(history)
        bar.close()

    summary = {
        "forget_examples": len(to_forget),
        "forget_without_span": forget_set.without_span,
        "forget_skipped": forget_set.skipped,
        "retain_examples": len(to_retain),
        "retain_skipped": retain_set.skipped,
        "onset_tokens": sum(item.targets for item in to_forget),
        "ordinary_tokens": sum(len(item.rows) - item.targets for item in to_forget),
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


def consult(
    ref_model: CausalLM,
    model: CausalLM,
    to_forget: list[Item],
    method: type[Objective],
    config: UnlearnConfig,
    accelerator: Accelerator,
    progress: bool,
    known: ReferenceCache | None = None,
) -> tuple[ReferenceCache, Head | None]:
    """Ask the reference everything once, unless its answers are known; return them and the head if it is needed.

    Where the reference is the model itself, it is asked without its adapter, if it has one. Its body is sent back to
    where it was.
    """
    if not method.needs_ref_head and method.ask(head_of(ref_model), config) is None:
        return build_cache(body_of(ref_model), accelerator.device, to_forget, None), None
    home = ref_model.device
    training = ref_model.training
    ref_model.to(accelerator.device).eval()
    weight, bias = head_of(ref_model)
    with (
        accelerator.autocast(),
        using_packed_attention(base_of(ref_model), accelerator.mixed_precision),
        without_adapter(ref_model) if ref_model is model else nullcontext(),
    ):
        cache = known or build_cache(
            body_of(ref_model),
            accelerator.device,
            to_forget,
            method.ask(Head(weight, bias), config),
            progress=progress,
        )
    # Only a head that training will change, or that mixed precision wants in another dtype, is copied.
    will_change = ref_model is model and weight.requires_grad
    dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else weight.dtype
    head = (
        Head(
            weight.detach().to(dtype, copy=will_change),
            None if bias is None else bias.detach().to(dtype, copy=will_change),
        )
        if method.needs_ref_head
        else None
    )
    if ref_model is not model:
        ref_model.to(home)  # type: ignore[arg-type]
    ref_model.train(training)
    return cache, head


@contextmanager
def ready_to_train(model: CausalLM, config: UnlearnConfig, accelerator: Accelerator) -> Iterator[None]:
    """Training mode, packed attention, gradient checkpointing as configured; all are put back on leaving."""
    training, base = model.training, base_of(model)
    checkpointed = any(getattr(m, "gradient_checkpointing", False) for m in base.modules())
    switch = config.gradient_checkpointing and not checkpointed
    # transformers 5 is renaming gradient checkpointing to activation checkpointing.
    name = "activation" if hasattr(base, "activation_checkpointing_enable") else "gradient"
    hooks = getattr(base, "_require_grads_hooks", None)
    model.train()
    if switch:
        getattr(base, f"{name}_checkpointing_enable")({"use_reentrant": False})
    # A checkpointed layer whose input needs no gradient may pass none to its adapter (reentrant checkpoints do not).
    if (switch or checkpointed) and not getattr(base, "_require_grads_hooks", None):
        base.enable_input_require_grads()
    try:
        with using_packed_attention(base, accelerator.mixed_precision):
            yield
    finally:
        if switch:
            getattr(base, f"{name}_checkpointing_disable")()
        if getattr(base, "_require_grads_hooks", None) is not hooks:
            base.disable_input_require_grads()  # removes ours, and forgets those that were there before
            base._require_grads_hooks = hooks or []
        model.train(training)


def add_up(counts: list[tuple[int, int, int, int]], accelerator: Accelerator) -> Tensor:
    """[4], float32: the counts of all micro-batches of all processes."""
    return accelerator.reduce(torch.tensor(counts, dtype=torch.float32, device=accelerator.device).sum(0), "sum")


def read_back(
    outputs: list[Losses], grad_norm: Tensor, method: type[Objective], config: UnlearnConfig, accelerator: Accelerator
) -> dict[str, float]:
    """The figures of a step, in the one read-back from the accelerator that a step costs."""
    sums = torch.stack([torch.cat([losses.total.detach()[None], losses.terms]) for losses in outputs]).sum(0)
    names = ["loss", *method.terms, "grad_norm"]
    figures = [*accelerator.reduce(sums, "sum"), grad_norm]
    if config.stop_probability is not None:
        highest = torch.stack([losses.highest_probability for losses in outputs]).max()
        names.append("onset_probability")
        figures.append(accelerator.gather(highest).max())
    return dict(zip(names, torch.stack([f.float() for f in figures]).tolist(), strict=True))


class _CallableModule(types.ModuleType):
    """Importing this submodule puts it where ``palu.unlearn(...)`` is looked up, so it can be called as well."""

    __call__ = staticmethod(unlearn)


sys.modules[__name__].__class__ = _CallableModule
