"""``palu.unlearn``: make a Llama forget chosen answers, and keep the rest."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import PreTrainedTokenizerBase, TrainerCallback, get_scheduler

from palu.config import UnlearnConfig
from palu.data.packing import Items
from palu.distributed import compute_on_main, raise_on_all_ranks
from palu.methods import Method
from palu.models.attention import use_packed_attention
from palu.models.lora import CausalLM, added_adapter, base_of, inputs_require_grad, is_peft
from palu.ref_model.precompute import precompute_reference
from palu.ref_model.shared import dropped_pairs
from palu.ref_model.storage import open_cache_file
from palu.training.asking import watch
from palu.training.callbacks import Evaluate, TrainingEvents, check_callbacks
from palu.training.checkpoint import open_checkpoints
from palu.training.datasets import RunData, check_forward_passes, prepare_run
from palu.training.engine import (
    SHARDED,
    keep_dtypes,
    loaded_on_main_alone,
    reference_root,
    start_engine,
    tracking,
    training_copy,
    weights_back_if_refused,
)
from palu.training.optimizer import make_optimizer
from palu.training.requests import read_earlier
from palu.training.step import DivergenceError, Run, check_watched, ending, losses_text, train_step
from palu.writable import check_folders

__all__ = ["DivergenceError", "UnlearnResult", "unlearn"]


@dataclass(frozen=True)
class UnlearnResult:
    """The result of :func:`unlearn`."""

    model: CausalLM  # the one passed in, trained in place
    history: list[dict[str, float]]  # one record per optimisation step
    summary: dict[str, Any]  # counts, outcome, timing, versions and the configuration

    def __repr__(self) -> str:
        """Say how many steps were taken and the last losses; the model and the history would fill pages."""
        return f"UnlearnResult(steps {len(self.history)}, {losses_text(self.history[-1])})"


def unlearn(
    model: CausalLM,
    ref_model: CausalLM | None,
    forget: Any,
    retain: Any,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    config: UnlearnConfig | None = None,
    recipe: str | None = None,
    evaluate: Evaluate | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    after: str | os.PathLike[str] | None = None,
    **overrides: Any,
) -> UnlearnResult:
    """Make ``model`` forget the spans of the forget set (PALU, arXiv 2601.03190). The model is trained in place.

    By default a LoRA adapter is trained, and merged into the model's weights at the end (``lora_rank``).

    Args:
        model: a ``LlamaForCausalLM``, or a causal LM whose logits are a linear head of its last hidden states (scaled
            or capped, too) and whose attention keeps packed examples apart (docs/models.md); or a ``peft.PeftModel`` of
            one, perhaps quantised by bitsandbytes, of which only the LoRA adapter is trained.
        ref_model: the frozen reference; ``None``: ``model`` as it is now, without a second copy of its body; for a
            ``PeftModel`` the model without its adapter: the KL takes back what an adapter has learnt before.
        forget: examples with ``secret`` or ``spans``: a path to JSONL, JSON, CSV, TSV or Parquet, a list of dicts, a
            ``datasets.Dataset``, a ``pandas.DataFrame``, or tokenised tensors; see :mod:`palu.data`; or what
            :func:`palu.data.load_forget` made of them. An example without a span is held by the KL alone.
        retain: examples to keep by cross-entropy, in the same forms. Beside them, or for ``None`` alone, PALU keeps by
            the KL what the reference itself answers (:mod:`palu.ref_model.anchors`). ``[]``, and for another objective
            ``None``: nothing, which needs ``lambda_retain=0``.
        tokenizer: a fast tokenizer; not needed for tokenised input, but for anchors.
        config: the settings; ``overrides`` replace single fields of it.
        recipe: ``"paper"``: the published loss (on the first three tokens of a span, K = 5000, without the reference's
            own answers). It replaces settings of ``config``, and ``overrides`` replace the recipe's.
        evaluate: a function of the model, in evaluation mode and without gradients, that returns numbers by name. It is
            called before the first step (``summary["evaluation_before"]``), every ``eval_steps`` steps and at the end
            (``eval_<name>`` in the step's record), and changes no bit of the run.
        callbacks: instances of ``transformers.TrainerCallback``, called as ``transformers.Trainer`` does, but with
            ``config`` as ``args``. docs/unlearn.md says which events come, and what ``control`` may ask for.
        after: the folder of a finished run (:func:`palu.save_run`) from whose model, which ``model`` must be, this one
            goes on. What that run and those before it were asked to forget is looked at between epochs; where a token
            has come back above the floor, its row takes part in the next one (``earlier`` in a record: how many do).

    Returns:
        :class:`UnlearnResult`. Each record of ``history`` holds step, epoch, loss, local, kl, retain (for another
        objective its own terms), grad_norm, learning_rate, tokens, tokens_per_second, and onset_probability, the
        highest, where the loss has a floor. A term of weight 0 is not computed: it is 0. ``summary["ended_by"]`` is
        ``"forgotten"`` (:func:`palu.training.step.enough_forgotten`, :func:`palu.training.asking.ask`) or
        ``"callback"`` where that ended the run before its last step, else None.

    Raises:
        DataError: the data cannot be used; the message names the row and the fix.
        ValueError, TypeError: a setting, the models or the tokenizer do not fit.
        DivergenceError: a loss or the gradient norm became NaN or inf.
        OSError: ``cache_dir``, ``checkpoint_dir`` or ``logging_dir`` cannot be written to.
        CacheError: there is no room for the reference's outputs in ``cache_dir``, or what is there cannot be used.
        CheckpointError: a checkpoint cannot be written, or is not one of this run.
        ImportError: the package of a tracker is missing.
        Exception: what a callback or ``evaluate`` raises. The model has the weights of the last step then, and where
            there is ``checkpoint_dir``, a checkpoint of it was written.
    """
    if not isinstance(config, UnlearnConfig | None):
        raise TypeError(f"config is a {type(config).__name__}; give a palu.UnlearnConfig, or its fields as arguments")
    config = (config or UnlearnConfig()).replace(recipe, **overrides)
    accelerator = start_engine(config)
    earlier = None if after is None else compute_on_main(lambda: read_earlier(after), accelerator)
    # Text to tokens with roles. Every complaint about settings, models and data comes before anything is changed.
    with raise_on_all_ranks(accelerator):
        check_callbacks(callbacks, evaluate, config)
        if accelerator.is_main_process:
            check_folders(config.folders)
        data = prepare_run(
            model,
            ref_model,
            forget,
            retain,
            tokenizer,
            config,
            device=accelerator.device,
            mixed_precision=accelerator.mixed_precision,
            processes=accelerator.num_processes,
            sharded=accelerator.distributed_type in SHARDED,
            empty=loaded_on_main_alone(accelerator) and not accelerator.is_main_process,
            warn=accelerator.is_main_process,
            earlier=earlier,
        )
        config = data.config
    with added_adapter(model, config.method.lora_rank, config.seed) as adapted:
        result = train(adapted, ref_model, data, tokenizer, accelerator, evaluate, callbacks)
    if adapted is not model:  # it has been merged
        result = dataclasses.replace(result, model=model)
    if config.progress and accelerator.is_main_process:
        wrote = result.summary["neighbours"] if retain is None and config.reference.neighbours else None
        print(ending(result.history, result.summary["ended_by"], config.method, neighbours=wrote), file=sys.stderr)
    return result


def train(
    model: CausalLM,
    ref_model: CausalLM | None,
    data: RunData,
    tokenizer: PreTrainedTokenizerBase | None,
    accelerator: Accelerator,
    evaluate: Evaluate | None,
    callbacks: Sequence[TrainerCallback],
) -> UnlearnResult:
    """Train the model on what :func:`palu.training.datasets.prepare_run` has made; see :func:`unlearn`."""
    config = data.config
    checkpoints = open_checkpoints(model, ref_model, data, accelerator)

    progress = config.progress and accelerator.is_main_process
    # An engine that shards comes first, so that no device ever holds the whole model.
    trained = training_copy(model, accelerator)
    optimizer = make_optimizer(trained.parameters(), config, accelerator)
    with keep_dtypes(accelerator):
        method, optimizer = accelerator.prepare(config.method_class(trained, config), optimizer)
    root: Method = accelerator.unwrap_model(method)
    with weights_back_if_refused(model, trained, accelerator):
        reference = root if ref_model is None else reference_root(ref_model, accelerator)
        with raise_on_all_ranks(accelerator):
            check_forward_passes(root, reference, data)
        # The reference runs once; then at most its head is needed.
        cache, root.ref_head = precompute_reference(
            reference,
            data.forget,
            data.anchor_prompts,
            config,
            accelerator,
            own=ref_model is None,
            earlier=data.earlier,
            file=open_cache_file(config, checkpoints.reference_key),
            progress=progress,
        )
    del reference
    set_seed(config.seed, device_specific=True)
    with training_mode(trained, config, accelerator), tracking(accelerator, config):
        loader = data.loader(cache, accelerator, trained)
        total_steps = config.total_steps(len(loader))
        scheduler = get_scheduler(config.lr_scheduler, optimizer, config.warmup_steps, total_steps)
        history = checkpoints.restore(trained, optimizer, scheduler)
        asks = ref_model is None and is_peft(model)
        run = Run(
            data, accelerator, model, trained, method, root, loader, optimizer, scheduler, checkpoints, history, asks
        )
        if checkpoints.told:
            watch(run, checkpoints.told)
        loader.returned = checkpoints.returned
        if not history:
            check_watched(run)
        with checkpoints.signals_deferred():  # Ctrl-C waits for the end of a step
            events = TrainingEvents(run, callbacks, evaluate, tokenizer, progress=progress)
            with events.around_run():
                for epoch in range(loader.skip(len(history)), -(-total_steps // len(loader)) + 1):
                    events.begin_epoch()
                    for batches in islice(loader, events.steps_left):
                        events.begin_step()
                        history.append(train_step(run, batches, epoch))
                        events.end_step()  # logs it; an evaluation and a checkpoint, where due
                        if checkpoints.ended_by:
                            break
                    events.end_epoch()
                    if checkpoints.ended_by:
                        break
            run.give_weights_back()

    summary = {
        **data.counts,
        "onset_tokens": int(Items.of(loader.forget).targets.sum()),
        "shared_beginnings": dropped_pairs(data.forget, cache.shared),
        "neighbours": cache.neighbours,
        "variants": cache.variants,
        "told_when_asked": len(checkpoints.told),
        "anchors": (everyday := len(cache.extra) - cache.neighbours - cache.variants - cache.earlier),
        "anchors_skipped": len(data.anchor_prompts.prompts) - everyday,
        "steps": len(history),
        "epochs": epoch,
        "ended_by": checkpoints.ended_by,
        "evaluation_before": checkpoints.evaluation_before,
        "seconds": checkpoints.seconds,
        "device": str(accelerator.device),
        "processes": accelerator.num_processes,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "config": config.replace(
            learning_rate=config.learning_rate or run.rate or None,
            epochs=config.epochs or -(-total_steps // len(loader)),
        ).values(),
    }
    return UnlearnResult(model, history, summary)


@contextmanager
def training_mode(model: CausalLM, config: UnlearnConfig, accelerator: Accelerator) -> Iterator[None]:
    """Put the model into training mode within the block, with packed attention and checkpointing as configured."""
    training, base = model.training, base_of(model)
    checkpointed = any(getattr(m, "gradient_checkpointing", False) for m in base.modules())
    switch = config.gradient_checkpointing and not checkpointed
    # transformers 5 is renaming gradient checkpointing to activation checkpointing.
    name = "activation" if hasattr(base, "activation_checkpointing_enable") else "gradient"
    model.train()
    with (
        inputs_require_grad(base) if switch or checkpointed else nullcontext(),
        use_packed_attention(base, accelerator.mixed_precision),
    ):
        if switch:
            getattr(base, f"{name}_checkpointing_enable")({"use_reentrant": False})
        try:
            yield
        finally:
            if switch:
                getattr(base, f"{name}_checkpointing_disable")()
            model.train(training)
