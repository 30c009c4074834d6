"""Every setting of a run, in one dataclass, checked."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

TARGETS = ("global_mean", "global_mean_detached", "local_mean")
KL_DIRECTIONS = ("forward", "reverse")
KL_PROMPTS = ("own", "other")
LOCAL_LOSSES = ("topk_mse", "unlikelihood")
OPTIMIZERS = ("adamw", "adamw_8bit")
LR_SCHEDULERS = ("constant", "constant_with_warmup", "linear", "cosine")

TRACKERS = ("tensorboard", "wandb")

EVAL_PREFIX = "eval_"  # of the names of an evaluation's figures in a step's record

# The methods, and what their papers or published code set where the user does not.
OBJECTIVES: dict[str, dict[str, float]] = {
    "palu": {},
    "ga": {"lambda_retain": 0.0},
    "gd": {},
    "dpo": {"beta": 0.1},
    "npo": {"beta": 0.1},
    "simnpo": {"beta": 4.5, "gamma": 0.125},
    "pdu": {},
    "tpo": {"beta": 0.32},
    "wga": {"beta": 1.0},
    "undial": {"beta": 10.0, "lambda_retain": 0.0},
    "rmu": {},
}

# Settings by one word. "paper": the loss of arXiv 2601.03190 as its authors published it. "onset": its local loss on
# the first tokens of a secret alone, with the settings that forgot best of those tried (docs/results.md).
RECIPES: dict[str, dict[str, Any]] = {
    "paper": {
        "local_loss": "topk_mse",
        "n": 3,
        "top_k": 5000,
        "target": "global_mean",
        "normalize": False,
        "lambda_kl": 1.0,
        "kl_direction": "reverse",
        "anchors": 0,
    },
    "onset": {"local_loss": "topk_mse", "n": 3},
}

# The valid values of fields that have a few.
CHOICES: dict[str, tuple[str, ...]] = {
    "objective": tuple(OBJECTIVES),
    "local_loss": LOCAL_LOSSES,
    "kl_direction": KL_DIRECTIONS,
    "kl_prompt": KL_PROMPTS,
    "optimizer": OPTIMIZERS,
    "lr_scheduler": LR_SCHEDULERS,
}

# Settings of one of PALU's local losses.
_READ_BY = {"topk_mse": ("top_k", "target", "normalize"), "unlikelihood": ("probability_floor", "kl_prompt")}

# Arguments of apply_chat_template that are palu's own.
_NOT_FOR_TEMPLATES = ("add_generation_prompt", "continue_final_message", "conversation", "tokenize")


def template_kwargs(given: Any) -> dict[str, Any] | None:
    """Copy ``chat_template_kwargs``, as JSON gives it back. Raises ValueError where it is not valid."""
    if given is None:
        return None
    told = f"chat_template_kwargs = {given!r}"
    if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
        raise ValueError(f"{told}: give a mapping of names to values, or None")
    if own := [name for name in _NOT_FOR_TEMPLATES if name in given]:
        raise ValueError(f"{told}: leave out {own[0]}, which palu sets itself")
    try:
        return json.loads(json.dumps(dict(given), allow_nan=False))
    except (TypeError, ValueError):
        raise ValueError(f"{told}: give values that JSON has (text, numbers, lists, ...); a date is text") from None


@dataclass(frozen=True)
class UnlearnConfig:
    """Settings of :func:`palu.unlearn`. Raises :class:`ValueError`, naming the field, where one is not valid.

    The loss (PALU, arXiv 2601.03190)::

        L = gamma * L_local + lambda_kl * L_kl + lambda_retain * L_retain

    Other objectives (:mod:`palu.methods.baselines`) read ``gamma`` as the weight of their forget loss,
    ``lambda_retain``, and the settings named after them; ``local_loss``, ``probability_floor``, ``n``, ``top_k``,
    ``target``, ``normalize``, ``lambda_kl``, ``kl_direction``, ``kl_prompt``, ``kl_rows`` and ``anchors`` are PALU's
    alone.

    Attributes:
        objective: ``"palu"``, or one of the methods it is compared with: ``"ga"`` (gradient ascent), ``"gd"``
            (gradient difference), ``"dpo"``, ``"npo"``, ``"simnpo"``, ``"pdu"``, ``"tpo"``, ``"wga"``, ``"undial"``,
            ``"rmu"``.
        local_loss: what is asked of an onset token. ``"unlikelihood"``: ``-log(1 - p)`` of the true token (arXiv
            1908.04319), while its probability p is above ``probability_floor``; what it loses goes to the model's other
            candidates. ``"topk_mse"``: the paper's local entropy loss, which flattens the ``top_k`` highest logits.
        probability_floor: ``"unlikelihood"``: a token that is not more probable than this is left alone, in that step;
            0: all are pushed until the end.
        n: onset length: the first ``n`` tokens of each span are acted on (the paper's is 3); -1: the whole span.
        top_k: ``"topk_mse"``: how many of the reference's highest logits are flattened at an onset token;
            clamped to the vocabulary. The paper's is 5000; few put the whole push on the tokens that matter.
        target: ``"topk_mse"``: what they are pulled towards: ``"global_mean"`` (mean of all current logits, with
            gradient), ``"global_mean_detached"``, ``"local_mean"`` (mean of the top-K) or a number.
        normalize: ``"topk_mse"``: divide each onset token's loss by its value for the reference, so that it starts at
            1 whatever the scale of the model's logits; False: the published loss.
        gamma: weight of the local loss; ``None``: what the objective's authors use, else 1. A term of weight 0
            is not computed, and stands as 0 in the history.
        lambda_kl: weight of the KL divergence to the reference on ordinary tokens.
        kl_prompt: what stands before a forget answer when the reference is asked for its ordinary tokens. ``"own"``:
            its own prompt, so that the words between the spans stay as well known as they are. ``"other"``: the prompt
            of the row half the set further, so that they become what the reference says without the question that they
            were memorised with; a row without a span keeps its own. Needs ``local_loss="unlikelihood"``.
        kl_rows: the most ordinary tokens of a forget example on which the KL is computed. Of longer answers so many are
            drawn by ``seed``, once for the run, and the reference's states are kept for these alone. ``None``: all.
        lambda_retain: weight of the cross-entropy on the retain set (RMU: of the distance from the reference's states
            there); ``None``: 1, for ``"ga"`` and ``"undial"`` 0.
        anchors: how many everyday prompts the reference answers before training, for the KL to keep these answers.
            ``None``: as many as the run can use; 0 if ``retain`` is ``[]``, or if there are retain examples but no
            tokenizer, or ``lambda_kl`` is 0.
        kl_direction: ``"forward"``: KL(P_ref || P_theta); ``"reverse"``: KL(P_theta || P_ref).
        beta: DPO, NPO, SimNPO, TPO: inverse temperature of the preference. WGA: the power of a token's probability that
            is its weight. UNDIAL: what the true token's logit is lowered by. ``None``: what their authors use.
        delta: SimNPO: margin on the mean token NLL.
        dual_step: PDU: step size of the retain loss's weight, which starts at ``lambda_retain``.
        retain_loss_bound: PDU: the retain loss above which that weight grows.
        layer_id: RMU: the layer, from 0, whose output is steered. No weight above it is trained.
        steering_coeff: RMU: the 2-norm of the random vector that it is steered to.
        optimizer: ``"adamw"``; beside bfloat16 weights it keeps the rest of their float32 bits. ``"adamw_8bit"``: its
            moments take a byte each, and bfloat16 weights are rounded at random (needs torchao; see docs/memory.md).
        learning_rate: AdamW's step size; 5e-5 for a Llama of 135M parameters, papers use 1e-5 for 1B to 8B.
        weight_decay: AdamW's decoupled weight decay.
        warmup_steps: optimisation steps over which the learning rate rises linearly from 0.
        lr_scheduler: ``"constant"``, ``"constant_with_warmup"``, ``"linear"`` or ``"cosine"``, as in
            ``transformers.get_scheduler``.
        max_grad_norm: gradients are clipped to this 2-norm.
        epochs: passes over the forget set.
        max_steps: optimisation steps of the run, in place of ``epochs``: the forget set is passed over as often as that
            takes, the last time perhaps in part. ``None``: ``epochs``.
        batch_size: forget examples per micro-batch and process.
        retain_batch_size: retain examples, and anchors, per micro-batch and process; ``None``: ``batch_size``.
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
        stop_probability: end after an epoch in which the true token's probability stayed below
            this at every onset position (other objectives: at every token they act on); ``None``: never.
        eval_steps: optimisation steps from one evaluation to the next; there is always one at the end. Needs something
            to evaluate; ``None``: only at the end, and where a callback asks for one.
        gradient_checkpointing: recompute activations in the backward pass (slower, less memory).
        merge_adapter: return the base of a ``PeftModel`` with the trained adapter merged into its weights; the
            ``PeftModel`` that was passed in must not be used any more.
        chunk_bytes: upper bound on the logits held at once by the losses, in bytes.
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
        seed: of the data order, of any dropout, and of what ``kl_rows`` draws.
        progress: show a progress bar.
        report_to: ``"tensorboard"``, ``"wandb"``, or both with a comma between them, get each step's record;
            ``None``: neither.
        logging_dir: folder for what they write.
    """

    objective: str = "palu"
    local_loss: str = "unlikelihood"
    probability_floor: float = 0.02
    n: int = -1
    top_k: int = 5
    target: str | float = "global_mean"
    normalize: bool = True
    gamma: float | None = None
    lambda_kl: float = 1.0
    kl_rows: int | None = None
    lambda_retain: float | None = None
    anchors: int | None = None
    kl_direction: str = "reverse"
    kl_prompt: str = "own"

    beta: float | None = None
    delta: float = 0.0
    dual_step: float = 1.0
    retain_loss_bound: float = 0.0
    layer_id: int = 7
    steering_coeff: float = 2.0

    optimizer: str = "adamw"
    learning_rate: float = 1e-5
    weight_decay: float = 0.0
    warmup_steps: int = 0
    lr_scheduler: str = "constant_with_warmup"
    max_grad_norm: float = 1.0

    epochs: int = 8
    max_steps: int | None = None
    batch_size: int = 8
    retain_batch_size: int | None = None
    gradient_accumulation_steps: int = 1
    max_tokens: int | None = None
    max_length: int = 1024
    allow_cut_spans: bool = False
    chat_template_kwargs: dict[str, Any] | None = dataclasses.field(default=None, hash=False)
    stop_probability: float | None = None
    eval_steps: int | None = None

    gradient_checkpointing: bool = False
    merge_adapter: bool = False
    chunk_bytes: int = 256 * 2**20
    cache_dir: str | None = None
    checkpoint_dir: str | None = None
    checkpoint_minutes: float = 10.0
    checkpoint_steps: int | None = None
    resume: bool = False
    seed: int = 0
    progress: bool = True
    report_to: str | None = None
    logging_dir: str = "runs"

    def __post_init__(self) -> None:
        def require(valid: bool, field: str, rule: str) -> None:
            if not valid:
                raise ValueError(f"{field} = {getattr(self, field)!r}: {rule}")

        def is_int(value: Any) -> bool:
            return isinstance(value, int) and not isinstance(value, bool)

        def is_number(value: Any) -> bool:
            return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)

        for field, choices in CHOICES.items():
            require(getattr(self, field) in choices, field, f"give one of {', '.join(choices)}")
        require(
            is_int(self.n) and (self.n == -1 or self.n > 0),
            "n",
            "give a positive integer, or -1 for whole spans",
        )
        require(
            is_number(self.probability_floor) and 0 <= self.probability_floor < 1,
            "probability_floor",
            "give a number from 0 to below 1",
        )
        require(is_int(self.top_k) and self.top_k > 0, "top_k", "give a positive integer")
        require(
            self.target in TARGETS if isinstance(self.target, str) else is_number(self.target),
            "target",
            f"give one of {', '.join(TARGETS)}, or a finite number",
        )
        require(
            self.anchors is None or (is_int(self.anchors) and self.anchors >= 0),
            "anchors",
            "give 0 or a positive integer, or None",
        )
        for field in ("normalize", "allow_cut_spans", "gradient_checkpointing", "merge_adapter", "resume", "progress"):
            require(isinstance(getattr(self, field), bool), field, "give True or False")
        for field in ("gamma", "lambda_retain"):
            value = getattr(self, field)
            require(value is None or (is_number(value) and value >= 0), field, "give a number that is not negative")
        for field in ("lambda_kl", "weight_decay", "dual_step", "retain_loss_bound"):
            value = getattr(self, field)
            require(is_number(value) and value >= 0, field, "give a number that is not negative")
        require(is_number(self.delta), "delta", "give a finite number")
        require(self.beta is None or (is_number(self.beta) and self.beta > 0), "beta", "give a positive number")
        for field in ("steering_coeff", "learning_rate", "max_grad_norm", "checkpoint_minutes"):
            value = getattr(self, field)
            require(is_number(value) and value > 0, field, "give a positive number")
        for field in ("epochs", "batch_size", "gradient_accumulation_steps", "chunk_bytes"):
            require(is_int(getattr(self, field)) and getattr(self, field) > 0, field, "give a positive integer")
        for field, none in (
            ("retain_batch_size", "batch_size"),
            ("kl_rows", "all ordinary tokens"),
            ("max_tokens", "no bound"),
            ("checkpoint_steps", "checkpoint_minutes"),
            ("max_steps", "epochs"),
            ("eval_steps", "one at the end"),
        ):
            value = getattr(self, field)
            require(
                value is None or (is_int(value) and value > 0), field, f"give a positive integer, or None for {none}"
            )
        # A copy: the caller's may change.
        object.__setattr__(self, "chat_template_kwargs", template_kwargs(self.chat_template_kwargs))
        require(is_int(self.max_length) and self.max_length > 1, "max_length", "give an integer above 1")
        for field in ("layer_id", "warmup_steps"):
            value = getattr(self, field)
            require(is_int(value) and value >= 0, field, "give 0 or a positive integer")
        for field in ("cache_dir", "checkpoint_dir"):
            value = getattr(self, field)
            require(
                value is None or (isinstance(value, str) and value != ""),
                field,
                "give a folder's path as a string, or None",
            )
        require(not self.resume or self.checkpoint_dir is not None, "resume", "give checkpoint_dir, too")
        require(
            self.report_to is None
            or (isinstance(self.report_to, str) and all(name in TRACKERS for name in self.trackers)),
            "report_to",
            f"give one of {', '.join(TRACKERS)}, both with a comma between them, or None",
        )
        require(isinstance(self.logging_dir, str) and self.logging_dir != "", "logging_dir", "give a folder's path")
        require(is_int(self.seed) and 0 <= self.seed < 2**32, "seed", "give an integer in [0, 2**32)")
        require(
            self.stop_probability is None or (is_number(self.stop_probability) and 0 < self.stop_probability < 1),
            "stop_probability",
            "give a number between 0 and 1, or None",
        )
        if self.objective == "palu":
            defaults = {field.name: field.default for field in dataclasses.fields(self)}
            for loss, fields in _READ_BY.items():
                for field in fields if loss != self.local_loss else ():
                    told = f'read by local_loss = "{loss}" alone; give that, too, or leave it out'
                    require(getattr(self, field) == defaults[field], field, told)

    def replace(self, **overrides: Any) -> UnlearnConfig:
        """Return this configuration with some fields changed. Raises TypeError on a name that is no field."""
        known = {field.name for field in dataclasses.fields(self)}
        for name in overrides:
            if name not in known:
                raise TypeError(f"{name!r} is no setting of palu.unlearn; the settings are {', '.join(sorted(known))}")
        return dataclasses.replace(self, **overrides)

    def with_recipe(self, recipe: str | None) -> UnlearnConfig:
        """Return this configuration with the settings of RECIPES[recipe]; None: as it is. Raises ValueError."""
        if recipe is None:
            return self
        if recipe not in RECIPES:
            raise ValueError(f"recipe = {recipe!r}: give one of {', '.join(RECIPES)}, or None")
        return self.replace(**RECIPES[recipe])

    def value(self, field: str) -> Any:
        """Return a field's value; where it is None, what the objective's authors use, if they say."""
        given = getattr(self, field)
        return {"gamma": 1.0, "lambda_retain": 1.0, **OBJECTIVES[self.objective]}.get(field) if given is None else given

    def values(self) -> dict[str, Any]:
        """Return every field's value."""
        return copy.deepcopy({field.name: self.value(field.name) for field in dataclasses.fields(self)})

    def total_steps(self, steps_per_epoch: int) -> int:
        """Return the optimisation steps of a run that nothing ends early."""
        return self.epochs * steps_per_epoch if self.max_steps is None else self.max_steps

    @property
    def weights(self) -> tuple[float, float, float]:
        """The weights of the three terms: (gamma, lambda_kl, lambda_retain)."""
        return self.value("gamma"), self.lambda_kl, self.value("lambda_retain")

    @property
    def folders(self) -> dict[str, str]:
        """The folders that a run writes to, by field."""
        unused = {"logging_dir"} if self.report_to is None else set()
        fields = {"cache_dir", "checkpoint_dir", "logging_dir"} - unused
        return {field: folder for field in sorted(fields) if (folder := getattr(self, field)) is not None}

    @property
    def trackers(self) -> tuple[str, ...]:
        """The names in ``report_to``."""
        return tuple(name.strip() for name in self.report_to.split(",")) if self.report_to is not None else ()
