"""Cases of cross_entropy_, unlikelihood_ and kl_div_: a block, or on Hopper up to 8 in a cluster, for each row."""

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from compare import acc_dtype
from machine import Case, Output, Phase, Placed
from torch import Tensor

from cases.draw import DTYPES, Draw, Fixed, short
from palu import eager

OF_LABELS = ("cross_entropy_", "unlikelihood_")  # the others compare two rows


def fixed(dtype: torch.dtype, rows_read: int) -> Iterator[Fixed]:
    """Yield a case for each path of a kernel that reads so many rows of logits for each row it writes."""
    pack = 16 // dtype.itemsize
    block = 64 * 1024 // dtype.itemsize // rows_read  # elements that a block of a cluster is for
    plain: dict[str, Any] = {"lead": 0, "pad": 0, "values": "normal", "infinite": 0.0}
    yield Fixed("no-rows", "no launch", plain | {"rows": 0, "vocabulary": 9})
    yield Fixed("one-entry", "a row of one entry", plain | {"rows": 3, "vocabulary": 1})
    yield Fixed(
        "within-a-pack",
        "rows shorter than 16 bytes, that begin and end anywhere in them, a gap after each row",
        plain | {"rows": 9, "vocabulary": max(pack - 1, 1), "lead": pack - 1, "pad": pack + 1},
    )
    yield Fixed("aligned", "whole packs only", plain | {"rows": 2, "vocabulary": 64 * pack, "together": True})
    yield Fixed(
        "apart",
        "packs cut at both ends of a row, a gap after it; the reference elsewhere in its packs",
        plain | {"rows": 3, "vocabulary": 40 * pack + 1, "lead": 1, "pad": pack, "together": False},
    )
    for values in ("extreme", "equal", "one high"):
        yield Fixed(
            values.replace(" ", "-"), "the largest exponent", plain | {"rows": 2, "vocabulary": 99, "values": values}
        )
    yield Fixed("minus-infinity", "logits that are -inf", plain | {"rows": 3, "vocabulary": 300, "infinite": 0.3})
    yield Fixed("one-block", "as much of a row as one block takes", plain | {"rows": 1, "vocabulary": block})
    for blocks in (2, 4, 8):
        sizes = plain | {"rows": 2, "vocabulary": blocks // 2 * block + 1, "lead": 3}
        yield Fixed(f"{blocks}-blocks", "a cluster of as many, with rows at any place of a pack", sizes)
    yield Fixed(
        "second-round",
        "a row longer than 8 * 512 threads times 4 packs: the loops over packs run twice in a cluster too; larger "
        "logits at the end, so that each round raises the maximum",
        plain | {"rows": 1, "vocabulary": 8 * 512 * 5 * pack + 5, "lead": 1, "values": "rising"},
    )


def fixed_with_others(dtype: torch.dtype) -> Iterator[Fixed]:
    """Yield those of a kernel that reads one row for each it writes, and needs an entry beside the label."""
    for case in fixed(dtype, rows_read=1):
        yield replace(case, sizes=case.sizes | {"vocabulary": max(case.sizes["vocabulary"], 2)})


def make(
    draw: Draw,
    *,
    op: str,
    dtype: torch.dtype | None = None,
    rows: int | None = None,
    vocabulary: int | None = None,
    lead: int | None = None,
    pad: int | None = None,
    together: bool | None = None,
    values: str | None = None,
    infinite: float | None = None,
) -> Case:
    """Make a case of logits [rows, vocabulary], for KL with a reference beside them.

    `together`: the reference's rows begin at the same place of a 16-byte pack. `infinite`: which share is -inf.
    """
    vocabulary = vocabulary or draw.vocabulary()
    if op == "unlikelihood_":
        vocabulary = max(vocabulary, 2)
    rows = draw.rows(vocabulary) if rows is None else rows
    dtype = dtype or draw.one(*DTYPES)
    z, kind = draw.logits(rows, vocabulary, dtype, values)
    weights = torch.rand(rows, dtype=acc_dtype(dtype)) * draw.one(1, 1, 1e-3)
    if rows and draw.chance(0.3):
        weights[draw.random.randrange(rows)] = draw.one(0.0, -1.0)
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
        kind += " with -inf"
    logits = Placed("logits", z, **draw.layout(vocabulary, lead, pad))
    weight, loss = Placed("row_weight", weights), Placed("loss", None, (rows,), acc_dtype(dtype))
    buffers = [logits, weight, loss]
    call: dict[str, Any] = {"dtype": DTYPES.index(dtype), "logits": logits, "logits_stride": logits.stride}
    call |= {"row_weight": weight, "loss": loss, "rows": rows, "vocab_size": vocabulary}
    other, reverse = z, op == "kl_div_reverse"
    text = f"{short(dtype)} [{rows}, {vocabulary}], logits {kind} {logits.place()}"
    floor = draw.one(0.0, 0.0213, 0.3)  # at none of them is a row of equal logits
    if op in OF_LABELS:
        launcher = op
        call |= {"labels": Placed("labels", labels)} | ({"floor": floor} if op == "unlikelihood_" else {})
        buffers.append(call["labels"])
    else:
        launcher = "kl_div_"
        # The other row: like the first, or unlike it; in the same place of a 16-byte pack, or not.
        moved = draw.one(0, 0.01, 1, 5)
        other = (z.double() + torch.randn(rows, vocabulary) * moved).to(dtype)
        if draw.chance(0.3):
            other = torch.randn(rows, vocabulary).to(dtype)
        together = draw.chance(0.5) if together is None else together
        place = logits.pointer % 16 // logits.element
        apart = draw.layout(vocabulary, lead=(place + 1) % (16 // logits.element))
        ref = Placed("ref_logits", other, **({"lead": place, "stride": logits.stride} if together else apart))
        buffers.append(ref)
        call |= {"ref_logits": ref, "ref_logits_stride": ref.stride, "reverse": reverse}
        text += f", ref {ref.place()}"

    def twin(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        values, w = z.to(dtype, copy=True), weights.to(acc_dtype(dtype))  # the values are overwritten
        if op == "cross_entropy_":
            return eager.cross_entropy_(values, labels, w), values
        if op == "unlikelihood_":
            return eager.unlikelihood_(values, labels, w, floor), values
        return eager.kl_div_(values, other.to(dtype), w, reverse), values

    true, same = twin(torch.float64), twin(dtype)
    scales = _scales(op, z, labels, other, weights, dtype)
    outputs = [Output(p, *of) for p, *of in zip((loss, logits), true, same, scales, strict=True)]
    return Case(text, buffers, [Phase(launcher, call, ["logits", "loss"], ["loss"])], outputs)


cross_entropy = partial(make, op="cross_entropy_")
unlikelihood = partial(make, op="unlikelihood_")
kl_div = partial(make, op="kl_div_")
kl_div_reverse = partial(make, op="kl_div_reverse")


def _scales(
    op: str, z: Tensor, labels: Tensor, other: Tensor, weights: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return what errors of the loss and of the gradient are relative to, for each row."""

    def of_finite(t: Tensor) -> Tensor:
        return torch.where(t.isfinite(), t, 0).double()

    rows, vocabulary = z.shape
    if not rows:
        return weights, weights
    largest, probability = of_finite(z).abs(), torch.softmax(z.double(), 1)
    if op == "unlikelihood_":  # p Q: an error of the margin is a relative one of p
        probability = probability.gather(1, labels[:, None]) * largest.amax(1, keepdim=True).clamp(min=1)
    elif op != "cross_entropy_":
        largest = torch.maximum(largest, of_finite(other).abs())
        if op == "kl_div_reverse":  # P ((x - y) - the difference of the logsumexps - KL)
            apart = (of_finite(z) - of_finite(other)).abs()
            probability = probability.amax(1, keepdim=True) * (1 + apart.amax(1, keepdim=True))
        else:
            probability = torch.maximum(probability, torch.softmax(other.double(), 1))
    of_loss, of_gradient = torch.clamp(largest.amax(1), min=1), probability.amax(1)
    if dtype == torch.float64:  # the truth is no better
        of_loss, of_gradient = of_loss * (1 + vocabulary / 4096), of_gradient * (1 + vocabulary / 4096)
    return of_loss, weights.double().abs() * of_gradient
