"""The settings that every run has, and how a setting is declared: its default, its check and the rule in words."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

TARGETS = ("global_mean", "global_mean_detached", "local_mean")
KL_DIRECTIONS = ("forward", "reverse")
TRACKERS = ("tensorboard", "wandb")

EVAL_PREFIX = "eval_"  # of the names of an evaluation's figures in a step's record

# Arguments of apply_chat_template that are palu's own.
_NOT_FOR_TEMPLATES = ("add_generation_prompt", "continue_final_message", "conversation", "tokenize")


def setting(
    default: Any, valid: Callable[[Any], bool], rule: str, choices: tuple[str, ...] = (), none: str = ""
) -> Any:
    """Declare a field of :class:`Settings`.

    ``rule``: what the error says of a value that is not valid; ``none``: what None means, if it may be.
    """
    metadata: dict[str, Any] = {"valid": valid, "rule": rule, "choices": choices}
    if none:
        metadata["valid"] = lambda value: value is None or valid(value)
        metadata["rule"] += f", or None for {none}"
    return dataclasses.field(default=default, metadata=metadata)


def choice(default: str, choices: tuple[str, ...]) -> Any:
    """Declare a field that holds one of a few words."""
    return setting(default, lambda value: value in choices, f"give one of {', '.join(choices)}", choices)


def flag(default: bool) -> Any:
    """Declare a field that is True or False."""
    return setting(default, lambda value: isinstance(value, bool), "give True or False")


def positive(default: float | None, none: str = "") -> Any:
    """Declare a field that holds a number above 0; ``none``: what None means, if it may be."""
    return setting(default, lambda value: is_number(value) and value > 0, "give a positive number", none=none)


def not_negative(default: float) -> Any:
    """Declare a field that holds 0 or a positive number."""
    return setting(default, lambda value: is_number(value) and value >= 0, "give a number that is not negative")


def count(default: int | None, none: str = "", *, zero: bool = False) -> Any:
    """Declare a field that holds a positive integer, with ``zero`` also 0; ``none``: what None means, if it may be."""
    rule = f"give {'0 or ' if zero else ''}a positive integer"
    return setting(default, lambda value: is_int(value) and value >= (0 if zero else 1), rule, none=none)


def folder(default: str | None, none: str = "") -> Any:
    """Declare a field that holds a folder's path; ``none``: what None means, if it may be."""
    rule = "give a folder's path as a string"
    return setting(default, lambda value: isinstance(value, str) and value != "", rule, none=none)


def is_int(value: Any) -> bool:
    """Whether a value is an integer, of Python or NumPy."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether a value is a finite number, of Python or NumPy."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def template_kwargs(given: Any) -> dict[str, Any] | None:
    """Copy ``chat_template_kwargs``, as JSON gives it back. Raises ValueError where it is not valid."""
    if given is None:
        return None
    shown = f"chat_template_kwargs = {given!r}"
    if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
        raise ValueError(f"{shown}: give a mapping of names to values, or None")
    if own := [name for name in _NOT_FOR_TEMPLATES if name in given]:
        raise ValueError(f"{shown}: leave out {own[0]}, which palu sets itself")
    try:
        return json.loads(json.dumps(dict(given), allow_nan=False))
    except (TypeError, ValueError):
        raise ValueError(f"{shown}: give values that JSON has (text, numbers, lists, ...); a date is text") from None


@dataclass(frozen=True)
class Settings:
    """Fields that are declared by :func:`setting`. Raises ValueError, naming the field, where one is not valid."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if getattr(value, "ndim", None) == 0:  # a number of NumPy, which JSON does not have
                value = value.item()
                object.__setattr__(self, field.name, value)
            self.require(
                "valid" not in field.metadata or field.metadata["valid"](value),
                field.name,
                field.metadata.get("rule", ""),
            )

    def require(self, valid: bool, field: str, rule: str) -> None:
        """Raise ValueError with the rule where the field is not valid."""
        if not valid:
            raise ValueError(f"{field} = {getattr(self, field)!r}: {rule}")


def field_names(settings: type[Settings]) -> list[str]:
    """List the fields of a class of settings that a user gives by name."""
    return [field.name for field in dataclasses.fields(settings) if field.name not in ("objective", "method")]


def field_values(settings: Settings) -> dict[str, Any]:
    """Return the value of each field that a user gives."""
    return {name: getattr(settings, name) for name in field_names(type(settings))}


def _has_trackers(value: Any) -> bool:
    return isinstance(value, str) and all(name.strip() in TRACKERS for name in value.split(","))


@dataclass(frozen=True)
class RunSettings(Settings):
    """What every run has: data, optimisation, memory, and where it writes; :class:`palu.UnlearnConfig` adds the method.

    Attributes:
        method: the settings of the method, an instance of its ``Settings``.
        learning_rate: AdamW's step size. ``None``: from the first gradient, so that the first step takes off, to first
            order, two thirds of the forget loss, a nat at most: ``gamma min(2/3 forget, 1) / ||gradient||_1``, since
            AdamW first moves every weight by the rate. (The published loss of PALU is in squared logits: two thirds.)
            It is the gradient of the first batch with something to forget; until then the weights stay as they are.
        weight_decay: AdamW's decoupled weight decay.
        warmup_steps: optimisation steps over which the learning rate rises linearly from 0.
        lr_scheduler: ``"constant"``, ``"constant_with_warmup"``, ``"linear"`` or ``"cosine"``, as in
            ``transformers.get_scheduler``.
        max_grad_norm: gradients are clipped to this 2-norm.
        epochs: the most passes over the forget set. A run ends earlier, but not before 48 steps, once no secret token
            was probable during two passes in a row. ``None``: for PALU 16 passes, or as many as make 96 steps if that
            is more; for other methods, and for the published loss, 8.
        max_steps: optimisation steps of the run, in place of ``epochs``: the forget set is passed over as often as that
            takes, the last time perhaps in part. ``None``: ``epochs``.
        batch_size: forget examples per micro-batch and process.
        retain_batch_size: retain examples per micro-batch and process; in a step there are as many neighbours and half
            as many everyday answers beside them, but none twice. ``None``: ``batch_size``.
        gradient_accumulation_steps: micro-batches per optimisation step.
        max_tokens: the most tokens (of forget examples, anchors and retain examples together) in one forward pass. A
            micro-batch with more is cut into several passes of the same step, which changes the result by rounding
            alone. A longer example has a pass of its own. ``None``: no bound.
        max_length: tokens per example; longer ones are cut on the right. Clamped to the model's positions, where it
            has a table of them (GPT-2).
        allow_cut_spans: whether ``max_length`` may cut off spans of the forget set, or parts of them. What is cut off
            is not forgotten. False: that is an error, which names the rows.
        chat_template_kwargs: values for the tokenizer's chat template, by name, such as
            ``{"date_string": "26 Jul 2024", "enable_thinking": False}``: passed to ``apply_chat_template`` wherever a
            text is rendered. ``None``: none.
        eval_steps: optimisation steps from one evaluation to the next, beside those before the first step and at the
            end. Needs something to evaluate; ``None``: only these two, and where a callback asks for one.
        gradient_checkpointing: recompute activations in the backward pass (slower, less memory).
        chunk_bytes: upper bound on the logits held at once by PALU's losses and the retain loss, in bytes; the methods
            that PALU is compared with hold those of all their rows.
        cache_dir: folder for the reference's outputs (:mod:`palu.ref_model.storage`), from which later runs with the
            same reference, forget set and settings take them instead of running it again; ``None``: they are kept in
            ``checkpoint_dir`` where that is given, else in memory.
        checkpoint_dir: folder for checkpoints (:mod:`palu.training.checkpoint`); ``None``: none are written.
        checkpoint_minutes: minutes from one checkpoint to the first step after which the next one is written; there is
            always one at the end, and after Ctrl-C or SIGTERM.
        checkpoint_steps: optimisation steps from one checkpoint to the next, in place of ``checkpoint_minutes``;
            ``None``: by time.
        resume: go on from the newest checkpoint in ``checkpoint_dir``; where there is none yet, start from the
            beginning. Pass the starting model, loaded again, and all other arguments as they were.
        seed: of the data order, of any dropout, and of what a method draws.
        progress: show a progress bar.
        report_to: ``"tensorboard"``, ``"wandb"``, or both with a comma between them, get each step's record;
            ``None``: neither.
        logging_dir: folder for what they write.
    """

    method: Any = None

    learning_rate: float | None = positive(None, "one from the first gradient")
    weight_decay: float = not_negative(0.0)
    warmup_steps: int = count(0, zero=True)
    lr_scheduler: str = choice("constant_with_warmup", ("constant", "constant_with_warmup", "linear", "cosine"))
    max_grad_norm: float = positive(1.0)

    epochs: int | None = count(None, "the method's")
    max_steps: int | None = count(None, "epochs")
    batch_size: int = count(8)
    retain_batch_size: int | None = count(None, "batch_size")
    gradient_accumulation_steps: int = count(1)
    max_tokens: int | None = count(None, "no bound")
    max_length: int = setting(1024, lambda value: is_int(value) and value > 1, "give an integer above 1")
    allow_cut_spans: bool = flag(False)
    chat_template_kwargs: dict[str, Any] | None = dataclasses.field(default=None, hash=False)
    eval_steps: int | None = count(None, "one before and one after")

    gradient_checkpointing: bool = flag(False)
    chunk_bytes: int = count(256 * 2**20)
    cache_dir: str | None = folder(None, "no folder")
    checkpoint_dir: str | None = folder(None, "no folder")
    checkpoint_minutes: float = positive(10.0)
    checkpoint_steps: int | None = count(None, "checkpoint_minutes")
    resume: bool = flag(False)
    seed: int = setting(0, lambda value: is_int(value) and 0 <= value < 2**32, "give an integer in [0, 2**32)")
    progress: bool = flag(True)
    report_to: str | None = setting(
        None, _has_trackers, f"give one of {', '.join(TRACKERS)}, both with a comma between them", none="neither"
    )
    logging_dir: str = folder("runs")

    def __post_init__(self) -> None:
        super().__post_init__()
        # A copy: the caller's may change.
        object.__setattr__(self, "chat_template_kwargs", template_kwargs(self.chat_template_kwargs))
        for field in ("checkpoint_minutes", "checkpoint_steps", "resume"):
            given = getattr(self, field) != getattr(type(self), field)
            self.require(not given or self.checkpoint_dir is not None, field, "give checkpoint_dir, too")
        self.require(
            self.lr_scheduler != "constant" or self.warmup_steps == 0,
            "warmup_steps",
            'lr_scheduler = "constant" has no warmup; give "constant_with_warmup"',
        )

    def total_steps(self, steps_per_epoch: int) -> int:
        """Return the optimisation steps of a run that nothing ends early."""
        if self.max_steps is not None:
            return self.max_steps
        return self.method.total_steps(steps_per_epoch) if self.epochs is None else self.epochs * steps_per_epoch

    @property
    def folders(self) -> dict[str, str]:
        """The folders that a run writes to, by field."""
        unused = {"logging_dir"} if self.report_to is None else set()
        fields = {"cache_dir", "checkpoint_dir", "logging_dir"} - unused
        return {field: path for field in sorted(fields) if (path := getattr(self, field)) is not None}

    @property
    def trackers(self) -> tuple[str, ...]:
        """The names in ``report_to``."""
        return () if self.report_to is None else tuple(name.strip() for name in self.report_to.split(","))
