"""``palu.PaluTrainer``: the loop of :func:`palu.unlearn` in the hands of ``transformers.Trainer``.

The objective, the order of the data and the reference cache are the same, so that with the same optimiser a run of one
is a run of the other, step by step. Trainer holds the plain model throughout: it saves, loads and evaluates it as ever.
Only while it trains, the model's ``forward`` takes a batch of forget and retain examples, too, and gives the losses of
the objective for it: DDP and FSDP, which wrap the model, see one forward.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from palu.adapter import CausalLM, base_of, inputs_with_gradients
from palu.attention import using_packed_attention
from palu.baselines import OBJECTIVES
from palu.cache_file import CacheFile, reference_key
from palu.checkpoint import CheckpointError
from palu.config import UnlearnConfig
from palu.consult import consult
from palu.feed import Feed
from palu.fingerprint import Fingerprints
from palu.objective import Losses, Objective
from palu.packing import Batch
from palu.sets import read_sets
from palu.unlearn import DivergenceError, add_up, read_back
from palu.validate import check_models

# Fields of UnlearnConfig that Trainer has arguments for: those decide.
TRAINERS = {
    "learning_rate": "learning_rate",
    "weight_decay": "weight_decay",
    "warmup_steps": "warmup_steps",
    "lr_scheduler": "lr_scheduler_type",
    "max_grad_norm": "max_grad_norm",
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_checkpointing": "activation_checkpointing",
    "checkpoint_dir": "output_dir",
    "checkpoint_steps": "save_steps",
    "resume": "resume_from_checkpoint",
    "seed": "seed",
    "progress": "disable_tqdm",
    "report_to": "report_to",
    "logging_dir": "output_dir",
}
# Arguments of Trainer that would change what is trained on, or its loss, and cannot here.
REFUSED = {
    "fp16": "fp16 underflows in the gradient of the losses; use bf16=True, or neither",
    "auto_find_batch_size": "the batches are drawn before it could find one; set per_device_train_batch_size",
    "dataloader_drop_last": "an epoch sees every forget example; leave it out",
    "label_smoothing_factor": "the objective has no labels to smooth; leave it out",
    "torch_compile": "the model would not be compiled with the objective; leave it out",
    "use_liger_kernel": "it replaces the forward that the objective needs; leave it out",
}
STATE = "palu.json"
OBJECTIVE = "palu_objective"  # the argument of ``forward`` that asks for the objective


class PaluTrainer(Trainer):
    """``transformers.Trainer`` that makes a model forget the spans of a forget set (PALU, arXiv 2601.03190)::

        trainer = palu.PaluTrainer(
            model,
            TrainingArguments("out", learning_rate=1e-5, num_train_epochs=8, per_device_train_batch_size=8),
            forget="forget.jsonl",
            retain="retain.jsonl",
            processing_class=tokenizer,
            config=palu.UnlearnConfig(top_k=50, lambda_kl=2.0),
        )
        trainer.train()
        trainer.save_model()  # the plain model

    ``args`` owns the optimisation, ``config`` the loss; a setting of ``config`` that ``args`` decides is refused unless
    it is the default. Trainer's own defaults are others than palu's: three epochs, a learning rate of 5e-5 that falls
    linearly. The losses are exact token means over the optimisation step, across accumulation and processes. The terms
    of the loss are logged beside Trainer's ``loss``; evaluation is the plain model's on ``eval_dataset``. Workers of
    ``args.dataloader_num_workers`` serve evaluation alone. A checkpoint also holds ``palu.json``: the key of the
    reference cache and the history.

    Args:
        model, ref_model, forget, retain: as for :func:`palu.unlearn`. Without a ``ref_model``, the reference is the
            ``model`` as it is now: to resume, pass the starting model again, not a checkpoint's.
        args: Trainer's; ``None``: its defaults.
        config: the loss, ``retain_batch_size``, ``max_length``, ``stop_probability``, ``cache_dir``, ``chunk_bytes``.
        processing_class: a fast tokenizer; not needed for tokenised input, but for anchors.
        kwargs: what else Trainer takes, but for ``train_dataset``, ``compute_loss_func`` and ``model_init``.

    Attributes:
        history: one record per optimisation step of the last ``train``: step, loss, its terms, and grad_norm.

    Raises:
        DataError: the data cannot be used; the message names the row and the mend.
        ValueError, TypeError: an argument, a setting, the models or the tokenizer do not fit.
        CacheError, CheckpointError: the reference cache, or the checkpoint to resume from, cannot be used.
    """

    loss_is_scaled_for_ga = True  # by the counts of the whole step
    model: Any

    def __init__(
        self,
        model: CausalLM,
        args: TrainingArguments | None = None,
        *,
        forget: Any,
        retain: Any = None,
        ref_model: CausalLM | None = None,
        config: UnlearnConfig | None = None,
        processing_class: Any = None,
        **kwargs: Any,
    ):
        args = args if args is not None else TrainingArguments("tmp_trainer")
        config = config if config is not None else UnlearnConfig()
        check_arguments(args, config, kwargs)
        tokenizer = processing_class if isinstance(processing_class, PreTrainedTokenizerBase) else None
        check_models(model, ref_model, tokenizer, args.device, args.mixed_precision)
        self.to_forget, self.to_retain, everyday, _ = read_sets(
            model, ref_model, forget, retain, tokenizer, _as_args_say(config, args), args.world_size
        )

        super().__init__(model, args, processing_class=processing_class, **kwargs)
        self.config, self.method = config, OBJECTIVES[config.objective]
        self.model.to(args.device)
        fingerprints = Fingerprints(model, ref_model, self.to_forget, [], everyday)
        depends_on = self.method.depends_on(config)
        self.reference_key = reference_key(config.objective, depends_on, self.accelerator, fingerprints)
        self.cache, self.ref_head = consult(
            model if ref_model is None else ref_model,
            model,
            self.to_forget,
            everyday,
            self.method,
            config,
            self.accelerator,
            file=None if config.cache_dir is None else CacheFile(config.cache_dir, self.reference_key),
            progress=not args.disable_tqdm and self.is_local_process_zero(),
        )
        self.steps_per_epoch = len(self._feed())
        self.history: list[dict[str, float]] = []
        self.logged = 0  # records of the history that have been
        self.done: list[tuple[Batch, Losses]] = []  # the micro-batches of this step

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Unlearn; see ``Trainer.train``.

        Raises:
            CheckpointError: the checkpoint is of another reference, or of another trainer.
            DivergenceError: a loss or the gradient norm became NaN or inf; the step is not taken.
        """
        self.objective: Objective = self.method(self.model, self.ref_head, self.config)
        self.history = self._history_of(resume_from_checkpoint)
        for record in self.history:
            self.objective.after_step(record)
        self.logged, self.done = len(self.history), []
        # transformers 5 is renaming gradient checkpointing to activation checkpointing.
        name = "activation" if hasattr(self.args, "activation_checkpointing") else "gradient"
        checkpointed = getattr(self.args, f"{name}_checkpointing")
        with (
            objective_in(self.model, self.objective),
            inputs_with_gradients(base_of(self.model)) if checkpointed else nullcontext(),
        ):
            return super().train(resume_from_checkpoint, *args, **kwargs)

    def get_train_dataloader(self) -> DataLoader:
        """The micro-batches of an epoch, in the order of :class:`palu.feed.Feed`."""
        batches = MicroBatches(self._feed(), self)
        # A generator of its own, so that it draws none of the model's random numbers.
        return DataLoader(batches, batch_size=None, collate_fn=_as_it_is, generator=torch.Generator())

    def num_examples(self, dataloader: DataLoader) -> int:
        """Forget examples of an epoch; for other loaders what Trainer says."""
        if isinstance(dataloader.dataset, MicroBatches):
            return len(self.to_forget)
        return super().num_examples(dataloader)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """A step's micro-batches, and the counts by which all of their losses are divided."""
        samples, _ = super().get_batch_samples(*args, **kwargs)
        return samples, add_up([sample[OBJECTIVE].counts for sample in samples], self.accelerator) if samples else None

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Forward and backward of a micro-batch; after a step's last one, its record, before it is taken."""
        with using_packed_attention(base_of(self.model), self.accelerator.mixed_precision):
            loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            self._record()
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The objective's loss of a micro-batch; the plain model's of anything else, as in evaluation."""
        if OBJECTIVE not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        batch = inputs[OBJECTIVE].to(self.args.device)
        with self.accelerator.autocast():
            losses: Losses = model(**{OBJECTIVE: (batch, num_items_in_batch)})
        self.done.append((batch, losses))
        # Data-parallel engines average gradients over processes; the loss wants their sum.
        loss = losses.total * self.accelerator.num_processes
        return (loss, losses) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """With the training loss, the means of its terms over the same steps (the highest onset_probability)."""
        records = self.history[self.logged :]
        if "loss" in logs and records:
            self.logged = len(self.history)
            for name in [name for name in records[0] if name not in ("step", "loss", "grad_norm", "tokens")]:
                values = [record[name] for record in records]
                logs[name] = max(values) if name == "onset_probability" else sum(values) / len(values)
        super().log(logs, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The plain model; see ``Trainer.save_model``."""
        super().save_model(output_dir, _internal_call)
        if _internal_call and output_dir is not None and self.args.should_save:  # a checkpoint
            state = {"reference": self.reference_key, "history": self.history}
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            (Path(output_dir) / STATE).write_text(json.dumps(state))

    def _feed(self) -> Feed:
        return Feed(
            self.to_forget,
            self.to_retain,
            self.cache,
            _as_args_say(self.config, self.args),
            process_index=self.accelerator.process_index,
            num_processes=self.accelerator.num_processes,
            pin_memory=self.accelerator.device.type == "cuda",
        )

    def _record(self) -> None:
        """Read this step's figures; refuse to take it where one is not finite."""
        batches, outputs = zip(*self.done, strict=True)
        self.done = []
        norm: Any = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm.to(self.args.device)
        record: dict[str, float] = {"step": self.state.global_step + 1}
        record |= read_back(list(batches), list(outputs), norm, self.method, self.config, self.accelerator)
        if not all(map(math.isfinite, record.values())):
            self.model.zero_grad()
            raise DivergenceError(record, self.history)
        record |= self.objective.after_step(record)
        self.history.append(record)
        if (limit := self.config.stop_probability) is not None and record["step"] % self.steps_per_epoch == 0:
            epoch = self.history[-self.steps_per_epoch :]
            self.control.should_training_stop |= max(r["onset_probability"] for r in epoch) < limit

    def _history_of(self, checkpoint: str | bool | None) -> list[dict[str, float]]:
        """The records of the steps before a checkpoint, which is of the same reference."""
        folder = get_last_checkpoint(self.args.output_dir) if checkpoint is True else checkpoint or None
        if folder is None:  # a new run; or Trainer will say that there is none
            return []
        try:
            state = json.loads((Path(folder) / STATE).read_text())
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{folder} is no checkpoint of PaluTrainer: {error}") from error
        if state["reference"] != self.reference_key:
            raise CheckpointError(
                f"{folder} belongs to a run with another reference; pass the model that it started from, and the same "
                "ref_model, forget set and config"
            )
        return state["history"]


def _as_args_say(config: UnlearnConfig, args: TrainingArguments) -> UnlearnConfig:
    """The settings with Trainer's batches, and at least its epochs."""
    return config.replace(
        batch_size=args.per_device_train_batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        epochs=args.max_steps if args.max_steps > 0 else max(math.ceil(args.num_train_epochs), 1),
        seed=args.seed if args.data_seed is None else args.data_seed,
    )


class MicroBatches(IterableDataset):
    """The micro-batches of an epoch of a feed; the next iteration gives the next epoch's.

    The first iteration gives the epoch that the trainer is in, which is not the first one after resuming; Trainer skips
    what it has seen of it.
    """

    def __init__(self, feed: Feed, trainer: PaluTrainer):
        self.feed, self.trainer, self.begun = feed, trainer, False

    def __len__(self) -> int:
        full, rest = divmod(len(self.feed.forget), self.feed.examples_per_step)
        per_round = self.feed.batch_size * self.feed.num_processes
        return full * (self.feed.examples_per_step // per_round) + -(-rest // per_round)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        taken = self.trainer.state.global_step
        if not self.begun and (epochs := taken // len(self.feed)):
            self.feed.skip(epochs * len(self.feed))
            for _ in self.feed:  # nothing is left of the last of these epochs
                raise AssertionError
        self.begun = True
        for step in self.feed:
            for batch in step:
                # Trainer counts tokens and operations by input_ids.
                yield {"input_ids": batch.packed.input_ids, OBJECTIVE: batch}


def _as_it_is(batch: Any) -> Any:
    return batch


@contextmanager
def objective_in(model: Any, objective: Objective) -> Iterator[None]:
    """Within the block, ``model(palu_objective=(batch, counts))`` gives the objective's losses, else what it gave."""
    own = "forward" in vars(model)
    plain = model.forward

    @functools.wraps(plain)  # its signature is read
    def forward(*args: Any, **kwargs: Any) -> Any:
        asked: tuple[Batch, Tensor] | None = kwargs.pop(OBJECTIVE, None)
        return plain(*args, **kwargs) if asked is None else objective(*asked)

    model.forward = forward
    try:
        yield
    finally:
        # Under mixed precision accelerate has wrapped it, and its wrapper stays, as it does after any training.
        if model.forward is forward:
            if own:
                model.forward = plain
            else:
                del model.forward


def check_arguments(args: TrainingArguments, config: UnlearnConfig, others: dict[str, Any]) -> None:
    """Raise ValueError or TypeError where two settings contradict each other, or one cannot have its effect."""
    defaults = UnlearnConfig()
    for field, argument in TRAINERS.items():
        if (value := getattr(config, field)) != getattr(defaults, field):
            raise ValueError(f"{field} = {value!r}: PaluTrainer goes by Trainer's {argument}; leave it out of config")
    if config.merge_adapter:
        raise ValueError(
            "merge_adapter = True: PaluTrainer leaves the adapter in; call merge_and_unload() of the trained model"
        )
    for name, reason in REFUSED.items():
        if value := getattr(args, name, None):
            raise ValueError(f"{name} = {value!r}: {reason}")
    if (strategy := getattr(args, "train_sampling_strategy", "random")) != "random":
        raise ValueError(f"train_sampling_strategy = {strategy!r}: palu draws forget and retain examples; leave it out")
    for name in ("train_dataset", "compute_loss_func", "model_init"):
        if others.get(name) is not None:
            raise TypeError(f"PaluTrainer takes no {name}: it trains the model given, on forget and retain")
    if args.n_gpu > 1:
        raise ValueError(
            f"this process has {args.n_gpu} GPUs, among which Trainer would divide a batch; start a process for each "
            "with torchrun or accelerate launch, or show it one by CUDA_VISIBLE_DEVICES"
        )
