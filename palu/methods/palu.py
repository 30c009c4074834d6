"""PALU (arXiv 2601.03190): a local loss on onset tokens, KL on ordinary ones, cross-entropy on the retain set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from palu.data.packing import Batch, Items, forget_items
from palu.losses import KLTerm, LocalTerm, UnlikelihoodTerm
from palu.methods.base import (
    ForgetSet,
    Method,
    MethodSettings,
    Reference,
    RefField,
    RefRows,
    RowTerm,
    Shares,
    WeightedTerm,
    retain_term,
)
from palu.models.head import Head, rows_per_chunk
from palu.ops import topk_mse, weight_mean
from palu.settings import (
    KL_DIRECTIONS,
    TARGETS,
    RunSettings,
    choice,
    count,
    flag,
    is_int,
    is_number,
    not_negative,
    setting,
)

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

# Settings of one of the local losses.
_READ_BY = {"topk_mse": ("top_k", "target", "normalize"), "unlikelihood": ("probability_floor", "kl_prompt")}


@dataclass(frozen=True)
class PaluSettings(MethodSettings):
    """Settings of PALU: ``L = gamma * L_local + lambda_kl * L_kl + lambda_retain * L_retain``.

    Attributes:
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
        lambda_kl: weight of the KL divergence to the reference on ordinary tokens.
        kl_direction: ``"forward"``: KL(P_ref || P_theta); ``"reverse"``: KL(P_theta || P_ref).
        kl_prompt: what stands before a forget answer when the reference is asked for its ordinary tokens. ``"own"``:
            its own prompt, so that the words between the spans stay as well known as they are. ``"other"``: the prompt
            of the row half the set further, so that they become what the reference says without the question that they
            were memorised with; a row without a span keeps its own. Needs ``local_loss="unlikelihood"``, and text.
        kl_rows: the most ordinary tokens of a forget example on which the KL is computed. Of longer answers so many are
            drawn by ``seed``, once for the run, and the reference's states are kept for these alone. ``None``: all.
        anchors: how many everyday prompts the reference answers before training, for the KL to keep these answers.
            ``None``: as many as the run can use; 0 if ``retain`` is ``[]``, or if there are retain examples but no
            tokenizer, or ``lambda_kl`` is 0.
    """

    local_loss: str = choice("unlikelihood", ("topk_mse", "unlikelihood"))
    probability_floor: float = setting(
        0.02, lambda value: is_number(value) and 0 <= value < 1, "give a number from 0 to below 1"
    )
    n: int = setting(
        -1, lambda value: is_int(value) and (value == -1 or value > 0), "give a positive integer, or -1 for whole spans"
    )
    top_k: int = count(5)
    target: str | float = setting(
        "global_mean",
        lambda value: value in TARGETS if isinstance(value, str) else is_number(value),
        f"give one of {', '.join(TARGETS)}, or a finite number",
    )
    normalize: bool = flag(True)
    lambda_kl: float = not_negative(1.0)
    kl_direction: str = choice("reverse", KL_DIRECTIONS)
    kl_prompt: str = choice("own", ("own", "other"))
    kl_rows: int | None = count(None, "all ordinary tokens")
    anchors: int | None = setting(
        None, lambda value: value is None or (is_int(value) and value >= 0), "give 0 or a positive integer, or None"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        default = {field: getattr(type(self), field) for fields in _READ_BY.values() for field in fields}
        for loss, fields in _READ_BY.items():
            for field in fields if loss != self.local_loss else ():
                rule = f'read by local_loss = "{loss}" alone; give that, too, or leave it out'
                self.require(getattr(self, field) == default[field], field, rule)


class PaluMethod(Method):
    """``gamma * local + lambda_kl * kl + lambda_retain * retain``.

    The targets are the onset tokens, the others the ordinary ones; see :mod:`palu.losses` for the terms. Only rows
    with a role reach the head.
    """

    Settings = PaluSettings
    title = "PALU"
    terms = ("local", "kl", "retain")

    @staticmethod
    def make_items(forget: ForgetSet, config: RunSettings) -> Items:
        """Make the items of the forget set: its onset and its ordinary rows, where a term or a figure reads them."""
        own: PaluSettings = config.method
        return forget_items(
            forget.examples,
            own.n,
            forget.eos_token_id,
            onset=own.gamma > 0 or config.stop_probability is not None,
            most_ordinary=own.kl_rows if own.lambda_kl > 0 else 0,
            seed=config.seed,
        )

    @staticmethod
    def reference(config: RunSettings) -> Reference:
        """Return: the highest logits at onset rows for the paper's loss; hidden states and head for the KL."""
        own: PaluSettings = config.method
        ranks, holds = own.gamma > 0 and own.local_loss == "topk_mse", own.lambda_kl > 0
        fields: list[RefField] = []
        settings: dict[str, Any] = {}
        if ranks:
            # int32 [onset, K]: the indices of the highest logits; [onset]: what the loss is divided by
            fields += [RefField("index", "targets"), RefField("scale", "targets")]
            settings = {"top_k": own.top_k, "target": own.target if own.normalize else None}
        if holds:
            fields.append(RefField("hidden", "others"))  # [ordinary, d]: the last hidden state

        def compute(rows: RefRows, head: Head) -> dict[str, Tensor]:
            outputs = {}
            if ranks:
                k = min(own.top_k, head.weight.shape[0])
                states = rows.targets.split(rows_per_chunk(head, config.chunk_bytes))
                chunks = [_highest(head.logits(chunk), k, own) for chunk in states]
                outputs["index"], outputs["scale"] = map(torch.cat, zip(*chunks, strict=True))
            if holds:
                outputs["hidden"] = rows.others.to(_product_dtype(rows.others, head))
            return outputs

        return Reference(
            tuple(fields),
            compute,
            {"fields": [field.name for field in fields]} | settings,
            head=holds,
            other_prompts=own.kl_prompt == "other",
            anchors=own.anchors,
        )

    def compute_losses(self, hidden: Tensor, head: Head, batch: Batch, shares: Shares) -> list[WeightedTerm]:
        """Return the local loss, the KL and the cross-entropy."""
        own: PaluSettings = self.settings
        targets, reference = batch.counts.targets, batch.reference
        terms: list[WeightedTerm] = []
        if own.gamma > 0 and own.local_loss == "unlikelihood":
            loss = UnlikelihoodTerm(batch.labels[:targets], own.probability_floor)
            terms.append(("local", RowTerm("targets", loss), own.gamma))
        elif own.gamma > 0:
            if self.weight_mean is None and head.softcap is None and not head.weight.requires_grad:
                self.weight_mean = weight_mean(head.weight)
            local = LocalTerm(reference["index"], own.target)
            terms.append(("local", RowTerm("targets", local, reference["scale"]), own.gamma))
        if own.lambda_kl > 0:
            kl = KLTerm(reference["hidden"], self.ref_head or head, reverse=own.kl_direction == "reverse")
            terms.append(("kl", RowTerm("others", kl), own.lambda_kl))
        if own.lambda_retain > 0:
            terms.append(("retain", retain_term(batch), own.lambda_retain))
        return terms


def _product_dtype(hidden: Tensor, head: Head) -> torch.dtype:
    """Return the dtype in which the head multiplies hidden states."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.weight.dtype


def _highest(logits: Tensor, k: int, settings: PaluSettings) -> tuple[Tensor, Tensor]:
    """Find the indices of the K highest of the logits [r, V], and their local loss (1 if not normalised)."""
    index = logits.topk(k, dim=-1, sorted=False).indices.int()
    if not settings.normalize:
        return index, logits.new_ones(len(logits))
    loss = topk_mse(logits, index, settings.target)
    return index, loss.where(loss > 0, 1)  # K = 1 with the local mean has nothing to flatten
