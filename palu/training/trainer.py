"""``palu.PaluTrainer``: the training of :func:`palu.unlearn` under ``transformers.Trainer``.

The method, the order of the data and the reference cache are the same, so that with the same optimiser a run of one
is a run of the other, step by step. Trainer holds the plain model throughout: it saves, loads and evaluates it as ever.
Only while it trains, the model's ``forward`` takes a batch of forget and retain examples, too, and gives the losses of
the method for it: DDP and FSDP, which wrap the model, see one forward.
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
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from palu.config import UnlearnConfig
from palu.data.packing import Batch
from palu.distributed import full_tensor
from palu.methods.base import Losses, Method
from palu.models.attention import use_packed_attention
from palu.models.lora import CausalLM, base_of, inputs_require_grad
from palu.models.root import ModelRoot
from palu.ref_model.precompute import precompute_reference
from palu.ref_model.storage import open_cache_file, reference_key
from palu.training.checkpoint import MAY_CHANGE_ON_RESUME, CheckpointError
from palu.training.dataloader import UnlearnDataLoader
from palu.training.datasets import check_forward_passes, prepare_run
from palu.training.step import DivergenceError, enough_forgotten, forward_backward, step_figures, sum_counts
from palu.writable import check_folders

# Fields of UnlearnConfig that Trainer has arguments for: those decide.
TRAINERS = {
    "learning_rate": "learning_rate",
    "weight_decay": "weight_decay",
    "warmup_steps": "warmup_steps",
    "lr_scheduler": "lr_scheduler_type",
    "max_grad_norm": "max_grad_norm",
    "epochs": "num_train_epochs",
    "max_steps": "max_steps",
    "eval_steps": "eval_steps",
    "batch_size": "per_device_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_checkpointing": "activation_checkpointing",
    "checkpoint_dir": "output_dir",
    "checkpoint_minutes": "save_strategy",
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
PARTS = "parts"  # of a micro-batch, each a Batch, in what the data loader yields


class PaluTrainer(Trainer):
    """``transformers.Trainer`` that makes a model forget the spans of a forget set (docs/trainer.md shows a script).

    ``args`` owns the optimisation, ``config`` the loss; a setting of ``config`` that ``args`` decides is refused unless
    it is the default. Trainer's own defaults are others than palu's: three epochs, a learning rate of 5e-5 that falls
    linearly. The losses are exact token means over the optimisation step, across accumulation and processes. The terms
    of the loss are logged beside Trainer's ``loss``; evaluation is the plain model's on ``eval_dataset``. Workers of
    ``args.dataloader_num_workers`` serve evaluation alone. A checkpoint also holds ``palu.json``: what the run was made
    with, as hashes and settings, and the history.

    Args:
        model, ref_model, forget, retain: as for :func:`palu.unlearn`, but that the model is trained as it is: the
            adapter that ``palu.unlearn`` adds by default is to be added before (``peft.get_peft_model``). Without a
            ``ref_model``, the reference is the ``model`` as it is now: to resume, pass the starting model again, not a
            checkpoint's.
        args: Trainer's; ``None``: its defaults.
        config: the loss, ``retain_batch_size``, ``max_length``, ``allow_cut_spans``, ``chat_template_kwargs``,
            ``cache_dir``, ``chunk_bytes``.
        processing_class: a fast tokenizer; not needed for tokenised input, but for anchors.
        kwargs: what else Trainer takes, but for ``train_dataset``, ``compute_loss_func`` and ``model_init``.

    Attributes:
        history: one record per optimisation step of the last ``train``: step, loss, its terms, and grad_norm.

    Raises:
        DataError, ValueError, TypeError, OSError, CacheError, CheckpointError: as :func:`palu.unlearn`.
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
        args, config = args or TrainingArguments("tmp_trainer"), config or UnlearnConfig()
        check_arguments(model, args, config, kwargs)
        check_folders(config.folders)
        config = config.replace(
            batch_size=args.per_device_train_batch_size,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            epochs=args.max_steps if args.max_steps > 0 else max(math.ceil(args.num_train_epochs), 1),  # at least
            lora_rank=None,  # the model is trained as it is given
            seed=args.seed if args.data_seed is None else args.data_seed,
        )
        data = prepare_run(
            model,
            ref_model,
            forget,
            retain,
            processing_class if isinstance(processing_class, PreTrainedTokenizerBase) else None,
            config,
            device=args.device,
            mixed_precision=args.mixed_precision,
            processes=args.world_size,
            sharded=bool(args.fsdp or args.deepspeed),
            empty=False,
            warn=args.process_index == 0,
        )
        root = ModelRoot(model)
        reference = root if ref_model is None else ModelRoot(ref_model)
        check_forward_passes(root, reference, data)

        super().__init__(model, args, processing_class=processing_class, **kwargs)
        self.data = data
        self.model.to(args.device)
        fingerprints = data.fingerprints(model, ref_model)
        self.reference_key = reference_key(data.config, self.accelerator, fingerprints)
        made_with = {"reference": self.reference_key, "retain set": fingerprints.retain}
        made_with |= {n: v for n, v in data.config.values().items() if n not in MAY_CHANGE_ON_RESUME | {"epochs"}}
        self.made_with = json.loads(json.dumps(made_with, default=float))  # what must be the same on resume
        self.cache, self.ref_head = precompute_reference(
            reference,
            data.forget,
            data.anchor_prompts,
            data.config,
            self.accelerator,
            own=ref_model is None,
            file=open_cache_file(data.config, self.reference_key),
            progress=not args.disable_tqdm and self.is_local_process_zero(),
        )
        self.steps_per_epoch = len(data.loader(self.cache, self.accelerator, self.model))
        self.history: list[dict[str, float]] = []
        self.logged = 0  # records of the history that have been
        self.done: list[tuple[Batch, Losses]] = []  # the micro-batches of this step
        self.norm: Any = None  # of this step's gradients, before they were clipped
        self._clip = self.accelerator.clip_grad_norm_
        self.accelerator.clip_grad_norm_ = self.clip_and_keep_norm
        self.add_callback(RecordStep(self))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Unlearn; see ``Trainer.train``.

        Raises:
            CheckpointError: the checkpoint is of another reference, retain set or config, or of another trainer.
            DivergenceError: a loss or the gradient norm became NaN or inf; the step is not taken.
        """
        self.method = self.data.config.method_class(self.model, self.data.config)
        self.method.ref_head = self.ref_head
        self.history = self._history_of(resume_from_checkpoint)
        self.logged, self.done = len(self.history), []
        # transformers 5 is renaming gradient checkpointing to activation checkpointing.
        checkpointed = getattr(self.args, "activation_checkpointing", self.args.gradient_checkpointing)
        with (
            method_in_forward(self.model, self.method),
            inputs_require_grad(base_of(self.model)) if checkpointed else nullcontext(),
        ):
            return super().train(resume_from_checkpoint, *args, **kwargs)

    def get_train_dataloader(self) -> DataLoader:
        """Return the micro-batches of an epoch, in the order of :class:`palu.training.dataloader.UnlearnDataLoader`."""
        loader = self.data.loader(self.cache, self.accelerator, self.model)
        loader.skip_epochs(len(self.history) // len(loader))  # what was seen of the epoch after these, Trainer skips
        # A generator of its own, so that it draws none of the model's random numbers.
        return DataLoader(MicroBatches(loader), None, generator=torch.Generator())

    def num_examples(self, dataloader: DataLoader) -> int:
        """Count the forget examples of an epoch; for other loaders as Trainer does."""
        if isinstance(dataloader.dataset, MicroBatches):
            return len(self.data.forget)
        return super().num_examples(dataloader)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """Return a step's micro-batches, and the counts by which all of their losses are divided."""
        samples, _ = super().get_batch_samples(*args, **kwargs)
        counts = [batch.counts for sample in samples for batch in sample[PARTS]]
        return samples, sum_counts(counts, self.accelerator) if samples else None

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Run forward and backward of a micro-batch, part by part."""
        model.train()
        if callable(train := getattr(self.optimizer, "train", None)):  # schedule-free ones
            train()
        counts: Any = num_items_in_batch
        parts, last = inputs[PARTS], self.accelerator.sync_gradients
        loss = torch.tensor(0.0)
        with use_packed_attention(base_of(self.model), self.accelerator.mixed_precision):
            for part in parts:
                ends_step = last and part is parts[-1]
                losses = forward_backward(model, part, counts, self.accelerator, last=ends_step)
                self.done.append((part, losses))
                loss = loss + losses.total.detach() * self.accelerator.num_processes
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log with the training loss the means of its terms over the same steps (the highest onset_probability)."""
        records = self.history[self.logged :]
        if "loss" in logs and records:
            self.logged = len(self.history)
            for name in [name for name in records[0] if name not in ("step", "loss", "grad_norm", "tokens")]:
                values = [record[name] for record in records]
                logs[name] = max(values) if name == "onset_probability" else sum(values) / len(values)
        super().log(logs, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the plain model; see ``Trainer.save_model``."""
        super().save_model(output_dir, _internal_call)
        if _internal_call and output_dir is not None and self.args.should_save:  # a checkpoint
            state = {"made_with": self.made_with, "history": self.history}
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            (Path(output_dir) / STATE).write_text(json.dumps(state))

    def clip_and_keep_norm(self, *args: Any, **kwargs: Any) -> Any:
        """Clip as Trainer asks for it, and keep the norm."""
        self.norm = self._clip(*args, **kwargs)
        return self.norm

    def record_step(self) -> None:
        """Add this step's figures to the history before it is taken; raise DivergenceError where one is not finite."""
        batches, outputs = zip(*self.done, strict=True)
        self.done = []
        norm, self.norm = self.norm, None
        if norm is None:  # nothing was clipped
            norm = nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        norm = full_tensor(torch.as_tensor(norm)).to(self.args.device)
        try:
            record = step_figures(batches, outputs, norm, self.method, self.accelerator, self.history)
        except DivergenceError:
            self.model.zero_grad()
            raise
        self.history.append(record)
        if record["step"] % self.steps_per_epoch == 0:
            self.control.should_training_stop |= enough_forgotten(self.history, self.steps_per_epoch, self.method)

    def _history_of(self, checkpoint: str | bool | None) -> list[dict[str, float]]:
        """Read the records of the steps before a checkpoint, and check that it is of the same run."""
        folder = get_last_checkpoint(self.args.output_dir) if checkpoint is True else checkpoint or None
        if folder is None:  # a new run; or Trainer will say that there is none
            return []
        try:
            state = json.loads((Path(folder) / STATE).read_text())
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{folder} is no checkpoint of PaluTrainer: {error}") from error
        saved = state.get("made_with", {})
        if differ := [name for name, value in self.made_with.items() if saved.get(name) != value]:
            raise CheckpointError(
                f"{folder} belongs to a run with another {', '.join(differ)}; pass the model that it started from, and "
                "the same ref_model, sets and config"
            )
        return state["history"]


class RecordStep(TrainerCallback):
    """Has a trainer record each step when its gradients have been clipped, before the optimizer takes it."""

    def __init__(self, trainer: PaluTrainer):
        self.trainer = trainer

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.record_step()


class MicroBatches(IterableDataset):
    """The micro-batches of a data loader, an epoch per iteration."""

    def __init__(self, loader: UnlearnDataLoader):
        self.loader = loader

    def __len__(self) -> int:
        full, rest = divmod(len(self.loader.forgotten), self.loader.examples_per_step)
        per_round = self.loader.batch_size * self.loader.num_processes
        return full * (self.loader.examples_per_step // per_round) + -(-rest // per_round)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for step in self.loader.rounds():
            for parts in step:
                ids = torch.cat([part.packed.input_ids for part in parts], dim=1)
                yield {"input_ids": ids, PARTS: parts}  # Trainer counts tokens and operations by them


@contextmanager
def method_in_forward(model: Any, method: Method) -> Iterator[None]:
    """Let ``model(batch, counts)`` give the method's losses within the block."""
    own = "forward" in vars(model)
    plain = model.forward

    @functools.wraps(plain)  # its signature is read
    def forward(*args: Any, **kwargs: Any) -> Any:
        return method(*args) if args and isinstance(args[0], Batch) else plain(*args, **kwargs)

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


def check_arguments(model: CausalLM, args: TrainingArguments, config: UnlearnConfig, others: dict[str, Any]) -> None:
    """Raise ValueError or TypeError where two settings contradict each other, or one cannot have its effect."""
    defaults = UnlearnConfig()
    for field, argument in TRAINERS.items():
        if (value := getattr(config, field)) != getattr(defaults, field):
            raise ValueError(f"{field} = {value!r}: PaluTrainer goes by Trainer's {argument}; leave it out of config")
    if (rank := config.method.lora_rank) not in (None, type(config.method)().lora_rank):
        raise ValueError(
            f"lora_rank = {rank}: PaluTrainer trains the model as it is; give a peft.PeftModel, and leave it out"
        )
    for name, reason in REFUSED.items():
        if value := getattr(args, name, None):
            raise ValueError(f"{name} = {value!r}: {reason}")
    accumulation = getattr(args.accelerator_config, "gradient_accumulation_kwargs", None) or {}
    if (steps := accumulation.get("num_steps", 1)) != 1:
        raise ValueError(
            f"accelerator_config: num_steps = {steps} comes after the batches are counted; leave it out, and set "
            f"gradient_accumulation_steps={steps}"
        )
    if (strategy := getattr(args, "train_sampling_strategy", "random")) != "random":
        raise ValueError(f"train_sampling_strategy = {strategy!r}: palu draws forget and retain examples; leave it out")
    if "tokenizer" in others:
        raise TypeError("PaluTrainer takes no tokenizer: pass it as processing_class, as to Trainer")
    for name in ("train_dataset", "compute_loss_func", "model_init"):
        if others.get(name) is not None:
            raise TypeError(f"PaluTrainer takes no {name}: it trains the model given, on forget and retain")
    if args.n_gpu > 1:
        raise ValueError(
            f"this process has {args.n_gpu} GPUs, among which Trainer would divide a batch; start a process for each "
            "with torchrun or accelerate launch, or show it one by CUDA_VISIBLE_DEVICES"
        )
    own = others.get("optimizers", (None, None))[0] is None and others.get("optimizer_cls_and_kwargs") is None
    if own and any(p.dtype == torch.bfloat16 and p.requires_grad for p in model.parameters()):
        raise ValueError(
            "the model's trainable weights are in bfloat16, in which Trainer's optimizers round most steps away; load "
            "it with dtype=torch.float32 and set bf16=True, or pass optimizers=(one with Kahan summation, None)"
        )
