"""PALU (arXiv 2601.03190): a local loss on onset tokens, KL on ordinary ones, cross-entropy on the retain set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from palu.data.packing import Batch, Items, forget_items
from palu.losses import KLTerm, LocalTerm, LocalUnlikelihoodTerm
from palu.methods.base import (
    FEWEST_STEPS,
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
from palu.models.head import Head, map_logits
from palu.ops import weight_mean
from palu.settings import (
    KL_DIRECTIONS,
    TARGETS,
    RunSettings,
    choice,
    count,
    is_int,
    is_number,
    not_negative,
    setting,
)

# Settings by one word. "paper": the loss of arXiv 2601.03190 as its authors published it.
RECIPES: dict[str, dict[str, Any]] = {
    "paper": {
        "local_loss": "topk_mse",
        "n": 3,
        "top_k": 5000,
        "target": "global_mean",
        "lambda_kl": 1.0,
        "kl_direction": "reverse",
        "anchors": 0,
        "neighbours": 0,
        "variants": 0,
        "lora_rank": None,
    },
}

# Settings of one of the local losses.
_READ_BY = {"topk_mse": ("target",), "unlikelihood": ("probability_floor",)}


@dataclass(frozen=True)
class PaluSettings(MethodSettings):
    """Settings of PALU: ``L = gamma * L_local + lambda_kl * L_kl + lambda_retain * L_retain``.

    Attributes:
        local_loss: what is asked of an onset token, among the reference's ``top_k`` candidates for its place.
            ``"unlikelihood"``: ``-log(1 - p)``, with p the token's probability among these candidates and itself, while
            p is above ``probability_floor`` (after arXiv 1908.04319); what it loses goes to the candidates, in their
            own proportions. ``"topk_mse"``: the paper's local entropy loss, which flattens the candidates.
        top_k: how many of the reference's highest logits are the candidates; clamped to the vocabulary. The paper's is
            5000.
        probability_floor: ``"unlikelihood"``: a token that is not more probable than this among its candidates is left
            alone, in that step; 0: all are pushed until the end.
        n: onset length: the first ``n`` tokens of each span are acted on (the paper's is 3); -1: the whole span.
        target: ``"topk_mse"``: what the candidates' logits are pulled towards: ``"global_mean"`` (mean of all current
            logits, with gradient), ``"global_mean_detached"``, ``"local_mean"`` (mean of the candidates) or a number.
        lambda_kl: weight of the KL divergence to the reference on ordinary tokens.
        kl_direction: ``"forward"``: KL(P_ref || P_theta); ``"reverse"``: KL(P_theta || P_ref).
        kl_rows: the most ordinary tokens of a forget example on which the KL is computed. Of longer answers so many are
            drawn by ``seed``, once for the run, and the reference's states are kept for these alone. ``None``: all.
        variants: from how many other candidates for the first token of an answer and of a secret the reference goes on,
            before training, and how many paraphrases of each question it writes and answers, beside the rows' own
            (``paraphrased_question``). Where that tells a secret in another way, this way is forgotten like a row: an
            epoch goes over both (:mod:`palu.ref_model.variants`). 0 for tokenised rows.
        neighbours: how many questions like each forget question, about other things, the reference writes and answers
            before training, for the KL to keep these answers (:mod:`palu.ref_model.neighbours`); some cannot be used.
            Fewer a row where that would make more than 512. 0 for rows without a question, for tokenised rows, and if
            ``retain`` is ``[]`` or ``lambda_kl`` is 0. What a secret begins with as these answers do is left alone
            (:mod:`palu.ref_model.shared`).
        anchors: how many everyday prompts it answers, for the KL to keep these, too. ``None``: as many as the run can
            use, 64 at most; 0 if ``retain`` is ``[]``, or if there are retain examples but no tokenizer, or
            ``lambda_kl`` is 0.
    """

    local_loss: str = choice("unlikelihood", ("topk_mse", "unlikelihood"))
    probability_floor: float = setting(
        0.002, lambda value: is_number(value) and 0 <= value < 1, "give a number from 0 to below 1"
    )
    n: int = setting(
        -1, lambda value: is_int(value) and (value == -1 or value > 0), "give a positive integer, or -1 for whole spans"
    )
    top_k: int = count(50)
    lora_rank: int | None = count(8, "all weights")
    target: str | float = setting(
        "global_mean",
        lambda value: value in TARGETS if isinstance(value, str) else is_number(value),
        f"give one of {', '.join(TARGETS)}, or a finite number",
    )
    lambda_kl: float = not_negative(16.0)
    kl_direction: str = choice("reverse", KL_DIRECTIONS)
    kl_rows: int | None = count(None, "all ordinary tokens")
    variants: int = count(10, zero=True)
    neighbours: int = count(24, zero=True)
    anchors: int | None = count(None, "as many as the run can use", zero=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(
            self.local_loss != "unlikelihood" or self.top_k > 1,
            "top_k",
            "the secret's own token may be the only candidate; give 2 or more",
        )
        default = {field: getattr(type(self), field) for fields in _READ_BY.values() for field in fields}
        for loss, fields in _READ_BY.items():
            for field in fields if loss != self.local_loss else ():
                rule = f'read by local_loss = "{loss}" alone; give that, too, or leave it out'
                self.require(getattr(self, field) == default[field], field, rule)

    def total_steps(self, steps_per_epoch: int) -> int:
        """Return the most steps; if a run ends by itself, 16 passes over forget set and variants, but 96 at least."""
        if self.ends_below is None:
            return super().total_steps(steps_per_epoch)
        return max(16 * steps_per_epoch, 2 * FEWEST_STEPS)

    @property
    def in_nats(self) -> bool:
        """Whether the local loss is in nats: ``"topk_mse"`` is in squared logits."""
        return self.local_loss == "unlikelihood"

    @property
    def ends_below(self) -> float | None:
        """A fifth, or a floor above it: a digit, of which there are ten, comes to rest near .15."""
        if self.local_loss != "unlikelihood" or self.probability_floor == 0 or self.gamma == 0:
            return None
        return max(self.probability_floor, 0.2)


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
        """Make the items of the forget set: its onset and its ordinary rows, where a term reads them."""
        own: PaluSettings = config.method
        return forget_items(
            forget.examples,
            own.n,
            forget.eos_token_id,
            onset=own.gamma > 0,
            most_ordinary=own.kl_rows if own.lambda_kl > 0 else 0,
            seed=config.seed,
        )

    @staticmethod
    def reference(config: RunSettings) -> Reference:
        """Return: the candidates at onset rows; hidden states and head for the KL."""
        own: PaluSettings = config.method
        ranks, holds = own.gamma > 0, own.lambda_kl > 0
        fields: list[RefField] = []
        settings: dict[str, Any] = {}
        if ranks:
            # int32 [onset, K]: the indices of the highest logits; for the unlikelihood [onset, 1 + K], the true first
            fields.append(RefField("index", "targets"))
            settings = {"top_k": own.top_k, "local_loss": own.local_loss}
            settings |= {"n": own.n} if own.variants else {}  # of a variant's secret, too, n tokens are targets
        if holds:
            fields.append(RefField("hidden", "others"))  # [ordinary, d]: the last hidden state

        def candidates(logits: Tensor, labels: Tensor) -> Tensor:
            index = logits.topk(min(own.top_k, logits.shape[-1]), sorted=False).indices.int()
            return torch.cat([labels[:, None].int(), index], 1) if own.local_loss == "unlikelihood" else index

        def compute(rows: RefRows, head: Head) -> dict[str, Tensor]:
            outputs = {}
            if ranks:
                outputs["index"] = map_logits(candidates, rows.targets, head, rows.target_labels, config.chunk_bytes)
            if holds:
                outputs["hidden"] = rows.others.to(_product_dtype(rows.others, head))
            return outputs

        return Reference(
            tuple(fields),
            compute,
            {"fields": [field.name for field in fields]} | settings,
            head=holds,
            anchors=own.anchors,
            neighbours=own.neighbours,
            variants=own.variants if own.gamma > 0 else 0,
        )

    def compute_losses(self, hidden: Tensor, head: Head, batch: Batch, shares: Shares) -> list[WeightedTerm]:
        """Return the local loss, the KL and the cross-entropy."""
        own: PaluSettings = self.settings
        reference = batch.reference
        terms: list[WeightedTerm] = []
        if own.gamma > 0 and own.local_loss == "unlikelihood":
            unlikelihood = LocalUnlikelihoodTerm(reference["index"], own.probability_floor)
            terms.append(("local", RowTerm("targets", unlikelihood), own.gamma))
        elif own.gamma > 0:
            if self.weight_mean is None and head.softcap is None and not head.weight.requires_grad:
                self.weight_mean = weight_mean(head.weight)
            terms.append(("local", RowTerm("targets", LocalTerm(reference["index"], own.target)), own.gamma))
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
