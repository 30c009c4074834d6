"""Random arguments of every op, what plain torch makes of them, and what errors are relative to.

pytest (tests/ops), the fuzzer (tests/stress) and the emulated GPU (tests/cuda_emulator) draw their calls here. What is
not given to a function is drawn.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from palu import eager
from palu.eager import acc_dtype

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)  # in the order of launch.h
INDEX_DTYPES = (torch.int32, torch.int64)
SETTING = dict.fromkeys(("topk_mse", "linear_topk_mse"), "target")  # of the losses of kept logits
SETTING |= dict.fromkeys(("topk_unlikelihood", "linear_topk_unlikelihood"), "floor")

Inputs = dict[str, Any]
Outputs = dict[str, Tensor]


@dataclass
class OpCase:
    """Inputs of one op; those that it overwrites are among its outputs under the same name."""

    op: str
    inputs: Inputs
    outputs: Callable[[Inputs], Outputs]  # by plain torch, in the dtype of the inputs
    dtype: torch.dtype
    scales: Callable[[Inputs, Outputs, torch.dtype], Outputs]  # of inputs and outputs in float64, and the dtype

    @property
    def text(self) -> str:
        """Say what its inputs are."""
        return ", ".join(f"{name} {describe(value)}" for name, value in self.inputs.items())

    def expected(self) -> dict[str, tuple[Tensor, Tensor, Tensor | None]]:
        """Return of each output the truth, what plain torch makes of it, and what errors are relative to."""
        inputs = {n: t.double() if is_floating(t) else t for n, t in self.inputs.items()}
        truth, plain = self.outputs(inputs), self.outputs(self.inputs)
        scales = self.scales(inputs, truth, self.dtype)
        return {name: (truth[name], plain[name], scales.get(name)) for name in truth}


def describe(value: Any) -> str:
    """Say what a tensor's dtype and shape are, or what another value is."""
    if not isinstance(value, Tensor):
        return repr(value)
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"


def is_floating(value: Any) -> bool:
    """Say whether it is a tensor of floating dtype."""
    return isinstance(value, Tensor) and value.is_floating_point()


class Draw:
    """All random choices of a case, from one seed. `large`: how often a vocabulary is one of a real model's size."""

    def __init__(self, seed: int, dtypes: tuple[torch.dtype, ...] = DTYPES, large: float = 0.03) -> None:
        self.random = random.Random(seed)
        self.dtypes, self.large = dtypes, large
        torch.manual_seed(seed)

    def one(self, *choices: Any) -> Any:
        """Return one of the choices."""
        return self.random.choice(choices)

    def chance(self, p: float) -> bool:
        """Return True with probability p."""
        return self.random.random() < p

    def size(self) -> int:
        """Return a size: mostly below ten; around powers of two, where loops change."""
        kind = self.random.random()
        if kind < 0.7:
            return self.random.randint(1, 9)
        return self.random.randint(10, 70) if kind < 0.95 else int(self.one(127, 128, 129, 255, 257))

    def vocabulary(self) -> int:
        """Return a size of the vocabulary: small, at the edge of a loop, of a tile or a cluster, or a real model's."""
        if not self.chance(self.large):
            return self.size()
        kind = self.random.random()
        if kind < 0.5:
            return int(self.one(256, 1000, 2047, 2048, 2049, 4095, 4096, 4097, 5003))
        if kind < 0.85:
            return int(self.one(8192, 16384, 32768, 65536)) + self.random.randint(-9, 9)
        return int(self.one(49152, 50257, 128256, 151936, 200_000, 200_003))

    def rows(self, vocabulary: int) -> int:
        """Return a number of rows; seldom none."""
        if self.chance(0.04):
            return 0
        return int(self.one(1, 1, 2, 3)) if vocabulary > 3000 else self.random.randint(1, self.one(5, 12, 40))

    def k(self, vocabulary: int) -> int:
        """Return how many candidates a row has; they may be more than the vocabulary has entries."""
        kind = self.random.random()
        if kind < 0.15:
            return 1
        if kind < 0.85 or vocabulary < 1000:
            return self.random.randint(1, min(vocabulary + 3, 70))
        return int(self.one(self.random.randint(1, 1500), 5000, 5119, 5120, 5121, 6000, 10_241))

    def logits(self, rows: int, vocabulary: int, dtype: torch.dtype, kind: str | None) -> Tensor:
        """Return logits that are "normal", "wide", "extreme", "equal", "one high" or "rising"."""
        kind = kind or self.one("normal", "normal", "wide", "extreme", "equal", "one high", "rising")
        z = torch.randn(rows, vocabulary, dtype=torch.float64)
        if kind == "wide":
            z *= 30
        elif kind == "extreme":
            z = z.sign() * 1e4 + z
        elif kind == "equal":
            z = z[:, :1].expand_as(z).clone() * 3
        elif kind == "one high" and rows:
            z[:, self.random.randrange(vocabulary)] = 60.0
        elif kind == "rising":
            z += torch.linspace(0, 20, vocabulary, dtype=torch.float64)
        return z.to(dtype)

    def index(
        self, rows: int, vocabulary: int, k: int, index_dtype: torch.dtype | None = None, kind: str | None = None
    ) -> Tensor:
        """Return an index [rows, k] that is "unique" in each row, "any", or all "one value"."""
        kind = kind or self.one("any", "unique", "unique", "one value")
        if kind == "unique" and k <= vocabulary:
            if vocabulary > 4000:  # a step that has no factor in common with the vocabulary
                step = next(s for s in range(vocabulary // 3 + 1, vocabulary) if math.gcd(s, vocabulary) == 1)
                at = (torch.randint(0, vocabulary, (rows, 1)) + torch.arange(k) * step) % vocabulary
            else:
                at = torch.rand(rows, vocabulary).topk(k).indices
        elif kind == "one value":
            at = torch.randint(0, vocabulary, (rows, 1)).expand(rows, k)
        else:
            at = torch.randint(0, vocabulary, (rows, k))
            if rows and k > 1:
                at[0, 0], at[-1, -1] = 0, vocabulary - 1
        return at.to(index_dtype or self.one(*INDEX_DTYPES)).contiguous()


def prefix_mask(
    draw: Draw,
    *,
    batch: int | None = None,
    length: int | None = None,
    n: int | None = None,
    gaps: float | None = None,
    eos: int | None = -1,  # drawn
) -> OpCase:
    """Labels [batch, length] of which a share `gaps` is not sensitive."""
    batch = int(draw.one(0, 1, 2, 3, 4, 5, 17)) if batch is None else batch
    length = int(draw.one(0, 1, 5, 31, 32, 33, 63, 255, 256, 257, 511, 600, 1025)) if length is None else length
    n = int(draw.one(-1, 0, 1, 3, 31, 32, 33, 256, 300, 2**62, 2**63 - 1)) if n is None else n
    eos = draw.one(None, None, 2, 0, -(2**63), 2**63 - 1) if eos == -1 else eos
    gaps = draw.one(0.0, 0.005, 0.1, 0.5, 1.0) if gaps is None else gaps  # long spans, short ones, none
    labels = torch.randint(0, 5, (batch, length))
    labels[torch.rand(batch, length) < gaps] = draw.one(-1, -100, -200, -(2**63))
    if labels.numel() and draw.chance(0.3):
        labels.view(-1)[draw.random.randrange(labels.numel())] = 2**63 - 1

    def outputs(a: Inputs) -> Outputs:
        """One token after the other."""
        mask = []
        for row in a["labels"].tolist():
            place = 0  # in a span
            for label in row:
                place = place + 1 if label >= 0 and label != a["eos_token_id"] else 0
                mask.append(place > 0 and (a["n"] == -1 or place <= a["n"]))
        return {"mask": torch.tensor(mask, dtype=torch.bool).view_as(a["labels"])}

    return OpCase("prefix_mask", {"labels": labels, "n": n, "eos_token_id": eos}, outputs, torch.bool, lambda *_: {})


def topk(
    draw: Draw,
    op: str,
    *,
    dtype: torch.dtype | None = None,
    rows: int | None = None,
    vocabulary: int | None = None,
    k: int | None = None,
    values: str | None = None,
    target: str | float | None = None,
    **index: Any,
) -> OpCase:
    """Logits [rows, vocabulary] of topk_mse or topk_unlikelihood, K entries of each, and the gradient that comes in.

    `index`: see `Draw.index`.
    """
    vocabulary = vocabulary or draw.vocabulary()
    rows = draw.rows(vocabulary) if rows is None else rows
    k, dtype = k or draw.k(vocabulary), dtype or draw.one(*draw.dtypes)
    grad = torch.randn(rows, dtype=acc_dtype(dtype)) * draw.one(1, 1e-3)
    if rows and draw.chance(0.3):
        grad[draw.random.randrange(rows)] = 0
    inputs = {"logits": draw.logits(rows, vocabulary, dtype, values), "grad": grad}
    inputs |= _index_and_setting(draw, op, rows, vocabulary, k, target, **index)
    return OpCase(op, inputs, partial(_topk_outputs, op), dtype, partial(_topk_scales, op))


def _index_and_setting(draw: Draw, op: str, rows: int, vocabulary: int, k: int, target: Any, **index: Any) -> Inputs:
    if op.endswith("topk_mse"):
        if target is None:
            target = draw.one("global_mean", "global_mean", "global_mean_detached", "local_mean", 0.5, -3, 0.0)
        return {"index": draw.index(rows, vocabulary, k, **index), "target": target}
    k = max(k, 2)
    index = draw.index(rows, vocabulary, k, **index)
    if draw.chance(0.5):  # the true token is one of the candidates
        index[:, draw.random.randrange(1, k)] = index[:, 0]
    return {"index": index, "floor": draw.one(0.0, 0.0213, 0.3)}  # at none of them is a row of equal logits


def _topk_outputs(op: str, a: Inputs) -> Outputs:
    leaf = a["logits"].clone().requires_grad_()
    loss, slope = getattr(eager, f"{op}_and_slope")(leaf, a["index"], a[SETTING[op]])
    (grad_logits,) = torch.autograd.grad(loss, leaf, a["grad"].to(loss.dtype))
    return {"loss": loss.detach(), "slope": slope.detach(), "grad_logits": grad_logits}


def _of_loss_and_slope(op: str, truth: Outputs, size: Tensor, eps: float) -> Outputs:
    """What errors of both are relative to, with `size` [R] that of a row's logits."""
    if op.endswith("unlikelihood"):  # an error of the margin is a relative one of p
        of_slope = truth["slope"][:, 0] * (1 + size)
        return {"loss": truth["loss"] + of_slope, "slope": of_slope}
    k = truth["slope"].shape[1]
    off = torch.maximum(truth["slope"].abs().amax(1) * k / 2, eps * size)
    return {"loss": truth["loss"] + size * off, "slope": size * 2 / k}


def _topk_scales(op: str, a: Inputs, truth: Outputs, dtype: torch.dtype) -> Outputs:
    # Beside rounding: a thread's sum for the mean is one of V/1024 terms, an entry that occurs often sums as many.
    (rows, vocabulary), k = a["logits"].shape, a["index"].shape[1]
    constant = abs(a["target"]) if isinstance(a.get("target"), Real) else 0.0
    size = a["logits"].abs().amax(1).clamp(min=constant) * (1 + vocabulary / 4096)
    counts = torch.zeros(rows, vocabulary).scatter_add_(1, a["index"].long(), torch.ones(rows, k))
    times = counts.max().item() if rows else 1
    eps = torch.finfo(acc_dtype(dtype)).eps
    if dtype == torch.float64:  # the truth is no better: it sums one term after the other
        times *= 1 + times / 64
        eps *= 64
    scales = _of_loss_and_slope(op, truth, size, eps)
    return scales | {"grad_logits": a["grad"].abs() * scales["slope"] * (2 + times)}


def linear_topk(
    draw: Draw,
    op: str,
    *,
    dtype: torch.dtype | None = None,
    rows: int | None = None,
    vocabulary: int | None = None,
    size: int | None = None,
    k: int | None = None,
    bias: bool | None = None,
    wanted: tuple[bool, bool, bool] | None = None,
    start: bool = True,
    target: str | float | None = None,
    **index: Any,
) -> OpCase:
    """Hidden [rows, size], weight [vocabulary, size], K entries for each row, and the gradient that comes in.

    `op`: linear_topk_mse or linear_topk_unlikelihood. `wanted`: which gradients, of hidden, weight and bias. `start`:
    they are added to something. `index`: see `Draw.index`.
    """
    if size is None:
        size = int(draw.one(0, 576, 2047, 2048, 4096)) if draw.chance(draw.large) else draw.size()
    vocabulary = vocabulary or (min(draw.vocabulary(), 5003) if size < 600 else draw.random.randint(1, 60))
    k = k or int(draw.one(1, 2, 7, 31, 32, 33, 40, 65, 100, 300))
    rows = int(draw.one(0, 1, 1, 2, 3, 5, 9)) if rows is None else rows
    dtype = dtype or draw.one(*draw.dtypes)
    bias = draw.chance(0.5) if bias is None else bias
    asked = wanted or (draw.chance(0.8), draw.chance(0.8), draw.chance(0.8))
    leaves = {
        "hidden": (torch.randn(rows, size) * draw.one(1, 1, 5)).to(dtype),
        "weight": (torch.randn(vocabulary, size) * draw.one(0.02, 1) + draw.one(0, 0, 0.1)).to(dtype),
        "bias": torch.randn(vocabulary).to(dtype) if bias else None,
    }
    inputs: Inputs = leaves | _index_and_setting(draw, op, rows, vocabulary, k, target, **index)
    inputs["grad"] = torch.randn(rows, dtype=acc_dtype(dtype))
    for (name, t), is_asked in zip(leaves.items(), asked, strict=True):
        begun = draw.one(0, 0.1) * start
        inputs[f"grad_{name}"] = (torch.randn(t.shape) * begun).to(dtype) if is_asked and t is not None else None
    return OpCase(op, inputs, partial(_linear_outputs, op), dtype, partial(_linear_scales, op))


def _linear_outputs(op: str, a: Inputs) -> Outputs:
    leaves = {n: a[n].clone().requires_grad_() for n in ("hidden", "weight", "bias") if a[n] is not None}
    logits = F.linear(leaves["hidden"], leaves["weight"], leaves.get("bias"))
    loss, slope = getattr(eager, f"{op.removeprefix('linear_')}_and_slope")(logits, a["index"], a[SETTING[op]])
    gradients = torch.autograd.grad(loss, list(leaves.values()), a["grad"].to(loss.dtype))
    starts = {f"grad_{n}": (a[f"grad_{n}"], g) for n, g in zip(leaves, gradients, strict=True)}
    sums = {n: start + g for n, (start, g) in starts.items() if start is not None}
    return {"loss": loss.detach(), "slope": slope.detach(), **sums}


def _linear_scales(op: str, a: Inputs, truth: Outputs, dtype: torch.dtype) -> Outputs:
    # Sums of products: errors are relative to the sum of their sizes.
    h, w, k = a["hidden"].abs(), a["weight"].abs(), a["index"].shape[1]
    sizes = (h @ w.t() + (0 if a["bias"] is None else a["bias"].abs())).amax(1)
    scales = _of_loss_and_slope(op, truth, sizes, torch.finfo(acc_dtype(dtype)).eps)
    of_row = 2 * truth["slope"].abs().amax(1).maximum(scales["slope"])  # of any of its slopes, and its error
    g = a["grad"].abs() * of_row * (k if op.endswith("topk_mse") else 2)  # of all; unlikelihood's come to 2 p
    if dtype == torch.float64:  # the truth is no better
        g = g * (1 + k / 64 + len(w) / 1024)
    return scales | {
        "grad_hidden": g * (w.max() if w.numel() else 0),
        "grad_weight": (g[:, None] * k * h).sum().expand(len(w)),
        "grad_bias": (g * k).sum().expand(len(w)),
    }


def softmax_loss(
    draw: Draw,
    op: str,
    *,
    dtype: torch.dtype | None = None,
    rows: int | None = None,
    vocabulary: int | None = None,
    values: str | None = None,
    infinite: float | None = None,
    reverse: bool | None = None,
) -> OpCase:
    """Logits [rows, vocabulary] of cross_entropy_ or kl_div_. `infinite`: which share is -inf."""
    vocabulary = vocabulary or draw.vocabulary()
    rows = draw.rows(vocabulary) if rows is None else rows
    dtype = dtype or draw.one(*draw.dtypes)
    z = draw.logits(rows, vocabulary, dtype, values)
    weight = torch.rand(rows, dtype=acc_dtype(dtype)) * draw.one(1, 1, 1e-3)
    if rows and draw.chance(0.3):
        weight[draw.random.randrange(rows)] = draw.one(0.0, -1.0)
    labels = torch.randint(0, vocabulary, (rows,))
    if rows and draw.chance(0.4):
        labels[0], labels[-1] = 0, vocabulary - 1
    if infinite is None and draw.chance(0.15) and vocabulary > 1:
        infinite = draw.one(0.01, 0.5)
    if infinite:
        gone = torch.rand(rows, vocabulary) < infinite
        for kept in (labels, (labels + 1) % vocabulary):
            gone[torch.arange(rows), kept] = False
        z[gone] = -math.inf
    inputs: Inputs = {"logits": z, "row_weight": weight}
    if op == "cross_entropy_":
        inputs["labels"] = labels
    else:  # the other row: like the first, or unlike it
        like = (z.double() + torch.randn(rows, vocabulary) * draw.one(0, 0.01, 1, 5)).to(dtype)
        inputs["ref_logits"] = torch.randn(rows, vocabulary).to(dtype) if draw.chance(0.3) else like
        inputs["reverse"] = draw.chance(0.5) if reverse is None else reverse
    return OpCase(op, inputs, _cross_entropy if op == "cross_entropy_" else _kl_div, dtype, _softmax_scales)


def _cross_entropy(a: Inputs) -> Outputs:
    z, w, label = a["logits"].to(a["row_weight"].dtype), a["row_weight"][:, None], a["labels"][:, None]
    loss = -z.log_softmax(1).gather(1, label)[:, 0]
    return {"loss": loss, "logits": (z.softmax(1) * w).scatter_add(1, label, -w).to(a["logits"].dtype)}


def _kl_div(a: Inputs) -> Outputs:
    log_p, log_q = (a[n].to(a["row_weight"].dtype).log_softmax(1) for n in ("logits", "ref_logits"))
    p, q = log_p.exp(), log_q.exp()
    if a["reverse"]:
        loss = (p * (log_p - log_q)).sum(1)
        gradient = p * (log_p - log_q - loss[:, None])
    else:
        loss, gradient = (q * (log_q - log_p)).sum(1), p - q
    return {"loss": loss, "logits": (gradient * a["row_weight"][:, None]).to(a["logits"].dtype)}


def _softmax_scales(a: Inputs, _: Outputs, dtype: torch.dtype) -> Outputs:
    z, other = a["logits"], a.get("ref_logits")
    finite, probability = z.nan_to_num(neginf=0.0), z.softmax(1)
    largest = finite.abs()
    if other is not None:
        finite_other = other.nan_to_num(neginf=0.0)
        largest = torch.maximum(largest, finite_other.abs())
        if a["reverse"]:  # P ((x - y) - the difference of the logsumexps - KL)
            apart = (finite - finite_other).abs()
            probability = probability.amax(1, keepdim=True) * (1 + apart.amax(1, keepdim=True))
        else:
            probability = torch.maximum(probability, other.softmax(1))
    more = 1 + z.shape[1] / 4096
    of_gradient = a["row_weight"].abs() * probability.amax(1)
    if dtype == torch.float64:  # the truth is no better
        of_gradient = of_gradient * more
    of_loss = largest.amax(1).clamp(min=1)
    if dtype == torch.float64 or other is not None:  # a dot product of two rows adds one term after the other
        of_loss = of_loss * more
    return {"loss": of_loss, "logits": of_gradient}
