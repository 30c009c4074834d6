"""Calls of the general ops on hidden states and a head (docs/general_ops.md): random arguments, and bounds on errors.

The truth is that of their twins in float64. Rows that are ignored, and entries that are not there, may hold NaN, which
no result may show.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from _call import Arguments, Bad, Call, for_twin, loss_and_gradients
from _draw import EXTREMES, FLOATS, NOT_FLOATS, NOT_INDICES, Draw, Shape, eps, largest, other
from torch import Tensor

from palu import eager, ops
from palu.eager import acc_dtype

NO_NUMBER = [0, 0.0, -1, math.nan, math.inf, True, "1"]
NO_CHOICE = ["", "Mean", "backward", None, 1]
NO_IGNORE_INDEX = [2**63, -(2**64), -100.0, "-100", None, True]
REDUCTIONS = ["mean", "sum", "none"]
VALUE = (ValueError,)


class Head:
    """Hidden states, a head and its options; those of a reference have a prefix."""

    def __init__(self, draw: Draw, lead: Shape, vocab: int, dtype: torch.dtype, whole: bool, prefix: str = "") -> None:
        self.lead, self.dtype, self.prefix = lead, dtype, prefix
        self.rows, d = math.prod(lead), draw.size()
        self.hidden = draw.normal((*lead, d), dtype, whole=whole)
        self.weight = draw.normal((vocab, d), dtype, whole=whole)
        self.bias = draw.normal((vocab,), dtype, whole=whole) if draw.chance(0.5) else None
        self.softcap = draw.one(None, None, 1.5, 30)
        self.scale = draw.one(1, 1.0, 0.5, 2, 0.5 if dtype == torch.bfloat16 else 0.3)  # rounds no hidden states
        # How far a logit may be off that is computed in the head's dtype, with a cap or without, and their size.
        numbers = self.numbers()
        bound = largest(numbers["hidden"].abs() @ numbers["weight"].abs().t()) + largest(numbers["bias"])
        self.largest = bound * self.scale if self.softcap is None else min(bound * self.scale, self.softcap)
        self.accumulated = 4 * eps(acc_dtype(dtype)) * bound * self.scale

    def arguments(self) -> Arguments:
        names = ("hidden", "weight", "bias", "softcap", "scale")
        return {f"{self.prefix}{name}": getattr(self, name) for name in names}

    def numbers(self) -> Arguments:
        """The tensors in float64, 0 for what is not finite: a result without it is compared all the same."""
        values = {name: getattr(self, name) for name in ("hidden", "weight", "bias")}
        return {n: None if t is None else t.double().nan_to_num(0, 0, 0) for n, t in values.items()}

    def off(self, dtype: torch.dtype) -> float:
        """How far a logit may be off that is rounded to `dtype`, before its cap and after it."""
        exact = eager.linear_logits(**self.numbers(), scale=self.scale)
        found = self.accumulated + 2 * largest(exact - exact.to(dtype).double())
        if self.softcap is not None:
            exact = torch.tanh(exact / self.softcap) * self.softcap
            found += 2 * largest(exact - exact.to(dtype).double())
        return found

    def bad(self, draw: Draw) -> list[Bad]:
        hidden, weight, bias, softcap, scale = self.arguments()
        found = [draw.length(hidden, dim) for dim in range(len(self.lead) + 1)] + [draw.length(weight, 1)]
        found += [draw.length(bias, 0)] if self.bias is not None else []
        found += [draw.scalar(softcap, draw.one(*NO_NUMBER), ValueError)]
        found += [draw.scalar(scale, draw.one(None, *NO_NUMBER), ValueError)]
        if self.rows:
            empty = Bad("V = 0", lambda a: a.update({n: a[n][:0] for n in (weight, bias) if a[n] is not None}), VALUE)
            found.append(empty)
        return found

    def dtypes(self) -> dict[str, list[torch.dtype]]:
        hidden, weight, bias, *_ = self.arguments()
        return {hidden: NOT_FLOATS, weight: other(self.dtype), bias: other(self.dtype)}


@dataclass
class Bounds:
    """What bounds the error of a call's results."""

    value: float  # of a result
    share: float  # of the gradient for a logit, as a share of it
    size: float  # the gradient for a row's logits, in sum, where the incoming one is 1


def off_by(head: Head, off: float, size: float, rows: int = 1) -> Bounds:
    """Of a loss of `rows` rows made of probabilities and `size` logarithms of them, where a logit may be `off`."""
    share = math.expm1(min(2 * off, 50)) + 64 * eps(acc_dtype(head.dtype))
    return Bounds(max(rows, 1) * share * size, share, 2 * size)


def general_call(
    draw: Draw,
    op: str,
    head: Head,
    own: Arguments,
    shape: Shape,
    bounds: Bounds,
    dtypes: dict[str, list[torch.dtype]],
    read: Callable[[Arguments], Arguments] = dict,
) -> Call:
    """A call with results of this shape, their gradients, and the bad arguments that all these ops know."""
    wanted = [n for n in ("hidden", "weight", "bias") if getattr(head, n) is not None and draw.chance(0.6)]
    arguments = head.arguments() | own | {"chunk_bytes": draw.one(1, 100, 4096, 2**28)}

    call = Call(
        op,
        lambda a: loss_and_gradients(getattr(ops, op), a, wanted, "create_graph" in a),
        lambda a: loss_and_gradients(getattr(eager, op), for_twin(a), wanted),
        arguments,
        read=read,
    )
    call.bad = draw.common(call, dtypes) + head.bad(draw)
    call.bad.append(draw.scalar("chunk_bytes", draw.one(0, -1, 1.5, True, None), ValueError))
    grad = draw.normal(shape, acc_dtype(head.dtype))
    of_logits = (bounds.share + 4 * eps(head.dtype)) * bounds.size * largest(grad) * head.scale
    numbers = head.numbers()
    through = {
        "hidden": largest(numbers["weight"]),
        "weight": head.rows * largest(numbers["hidden"]),
        "bias": head.rows,
    }
    call.error = [bounds.value, *(of_logits * through[name] for name in wanted)]
    if wanted:
        arguments["grad"] = grad
        call.bad.append(Bad("create_graph", lambda a: a.update(create_graph=True), (RuntimeError,)))
    return call


def sizes(draw: Draw) -> tuple[Shape, int, int]:
    """Leading dimensions, V and K."""
    rows, vocab, k = draw.rows_and_vocabulary()
    few = min(rows, 9)
    return draw.one((rows,), (rows,), (1, rows), (few, 3), (2, few), (2, few, 2)), vocab, k


def one_head(draw: Draw) -> tuple[Head, int, int]:
    lead, vocab, k = sizes(draw)
    dtype = draw.floating()
    # With other values bfloat16's rounding of the logits hides whatever is smaller.
    return Head(draw, lead, vocab, dtype, whole=dtype == torch.bfloat16 and draw.chance(0.8)), vocab, k


# ------------------------------------------------------------------------------------------ chosen entries


def chosen(draw: Draw, head: Head, vocab: int, k: int) -> tuple[Tensor, list[Bad]]:
    index = draw.integers((*head.lead, k), vocab, draw.one(torch.int32, torch.int64))
    found = [draw.length("index", dim) for dim in range(len(head.lead))]
    if index.numel():
        found += [
            draw.value("index", vocab, IndexError),
            Bad("K = 0", lambda a: a.update(index=a["index"][..., :0]), VALUE),
        ]
    return index, found


def linear_topk_logits(draw: Draw) -> Call:
    head, vocab, k = one_head(draw)
    index, bad = chosen(draw, head, vocab, k)
    own = {"index": index, "impl": draw.one("auto", "gather", "dense")}
    off = head.off(head.dtype)
    bounds = Bounds(off, off + 64 * eps(acc_dtype(head.dtype)), k)
    dtypes = {"index": NOT_INDICES, **head.dtypes()}
    call = general_call(draw, "linear_topk_logits", head, own, tuple(index.shape), bounds, dtypes)
    call.bad += [*bad, draw.scalar("impl", draw.one(*NO_CHOICE), ValueError)]
    return call


def linear_topk_log_probs(draw: Draw) -> Call:
    head, vocab, k = one_head(draw)
    index, bad = chosen(draw, head, vocab, k)
    bounds = off_by(head, head.off(head.dtype), 1 + 2 * head.largest + math.log(1 + vocab))
    bounds.size = 2 * k
    dtypes = {"index": NOT_INDICES, **head.dtypes()}
    call = general_call(draw, "linear_topk_log_probs", head, {"index": index}, tuple(index.shape), bounds, dtypes)
    call.bad += bad
    return call


# -------------------------------------------------------------------------------------------------- losses


def reduced(draw: Draw, shape: Shape) -> tuple[str, Shape, int]:
    """A reduction, the shape of its result, and how many rows may be added up in it."""
    reduction = draw.one(*REDUCTIONS)
    return reduction, shape if reduction == "none" else (), math.prod(shape) if reduction == "sum" else 1


def unread(draw: Draw, head: Head, ignored: Callable[[Arguments], Tensor], a: Arguments) -> None:
    """Put NaN, at times, into the hidden states of ignored rows [...]."""
    hidden = head.hidden
    if draw.chance(0.5) and not any(n > 1 and s == 0 for n, s in zip(hidden.shape, hidden.stride(), strict=True)):
        hidden[ignored(a)] = math.nan


def drawn_labels(draw: Draw, lead: Shape, vocab: int, ignore_index: int) -> Tensor:
    labels = torch.randint(0, max(vocab, 1), lead)
    labels[torch.rand(lead) < draw.one(0, 0, 0.2, 0.2, 0.5, 1)] = ignore_index
    return draw.place(labels, lambda: draw.out_of_range(vocab, torch.int64))


def linear_topk_kl(draw: Draw) -> Call:
    head, vocab, k = one_head(draw)
    lead, k = head.lead, min(k, vocab)
    reduction, shape, rows = reduced(draw, lead)
    dtype = draw.one(torch.int32, torch.int64)
    direction, tail = draw.one("forward", "reverse"), draw.one("ignore", "bucket")
    ignore_index = draw.one(-100, -100, -1, 0, torch.iinfo(dtype).max)
    index = torch.rand(*lead, vocab).argsort(-1)[..., :k].to(dtype)
    # In reverse the teacher leaves something to the rest: its logarithm is no more exact than 1 - sum.
    mass = draw.one(0.9, 0.5) if (direction, tail) == ("reverse", "bucket") else draw.one(1, 0.9)
    teacher = (draw.one(1, 3) * torch.randn(*lead, vocab)).log_softmax(-1)[..., :k] + math.log(mass)
    index[torch.rand(index.shape) < draw.one(0, 0.3)] = ignore_index
    index[torch.rand(lead) < draw.one(0, 0, 0.2, 0.2, 0.5, 1)] = ignore_index
    teacher = teacher.to(draw.one(*FLOATS, torch.float16)).masked_fill(index == ignore_index, math.nan)
    own = {
        "index": draw.place(index, lambda: draw.out_of_range(vocab, dtype), expand=False),
        "teacher_log_probs": draw.place(teacher, lambda: math.nan, expand=False),
        "direction": direction,
        "tail": tail,
        "ignore_index": ignore_index,
        "reduction": reduction,
    }

    def ignored(a: Arguments) -> Tensor:
        return (a["index"] == a["ignore_index"]).all(-1)

    def read(a: Arguments) -> Arguments:
        there = a["index"] != a["ignore_index"]
        hidden = a["hidden"].masked_fill(ignored(a)[..., None], 0)
        return a | {"hidden": hidden, "teacher_log_probs": a["teacher_log_probs"].masked_fill(~there, 0)}

    logarithms = (
        1 + 2 * head.largest + math.log(1 + vocab) + largest(read(own | {"hidden": head.hidden})["teacher_log_probs"])
    )
    bounds = off_by(head, head.off(head.dtype), logarithms, rows)
    unread(draw, head, ignored, own)
    dtypes = {"index": NOT_INDICES, "teacher_log_probs": [t for t in NOT_FLOATS if t != torch.float16], **head.dtypes()}
    call = general_call(draw, "linear_topk_kl", head, own, shape, bounds, dtypes, read)
    call.bad += [draw.scalar(name, draw.one(*NO_CHOICE), ValueError) for name in ("direction", "tail", "reduction")]
    call.bad.append(draw.scalar("ignore_index", draw.one(*NO_IGNORE_INDEX, torch.iinfo(dtype).max + 1), ValueError))
    call.bad += [draw.length(name, dim) for name in ("index", "teacher_log_probs") for dim in range(len(lead))]
    call.bad.append(draw.length("teacher_log_probs", -1))
    if index.numel():
        call.bad.append(draw.value("index", vocab, IndexError, ignore=ignore_index))
        none = ("index", "teacher_log_probs")
        call.bad.append(Bad("K = 0", lambda a: a.update({name: a[name][..., :0] for name in none}), VALUE))
    if len(places := (index != ignore_index).nonzero()):
        place = tuple(draw.one(*places.tolist()))

        def no_logarithm(a: Arguments) -> None:
            a["teacher_log_probs"] = a["teacher_log_probs"].clone()
            a["teacher_log_probs"][place] = draw.one(0.1, 3.0, math.inf, math.nan)

        def twice(a: Arguments) -> None:
            a["index"] = a["index"].clone()
            a["index"][(*place[:-1], draw.one(*(i for i in range(k) if i != place[-1])))] = a["index"][place]
            a["teacher_log_probs"] = torch.full_like(a["teacher_log_probs"], -100.0)

        call.bad.append(Bad("a probability above 1.05", no_logarithm, VALUE))
        call.bad += [Bad("an entry twice", twice, VALUE)] if k > 1 else []
    return call


def linear_kl(draw: Draw) -> Call:
    lead, vocab, _ = sizes(draw)
    dtype, ref_dtype = draw.floating(), draw.floating()
    ref_dtype = draw.one(dtype, dtype, ref_dtype)
    whole = torch.bfloat16 in (dtype, ref_dtype) and draw.chance(0.8)
    head, reference = Head(draw, lead, vocab, dtype, whole), Head(draw, lead, vocab, ref_dtype, whole, "ref_")
    reduction, shape, rows = reduced(draw, lead)
    ignore_index = draw.one(-100, -100, 0, *EXTREMES)
    own = reference.arguments() | {
        "labels": drawn_labels(draw, lead, vocab, ignore_index) if draw.chance(0.6) else None,
        "direction": draw.one("forward", "reverse"),
        "ignore_index": ignore_index,
        "reduction": reduction,
    }

    def ignored(a: Arguments) -> Tensor:
        return torch.zeros(lead, dtype=torch.bool) if a["labels"] is None else a["labels"] == a["ignore_index"]

    def read(a: Arguments) -> Arguments:
        return a | {n: a[n].masked_fill(ignored(a)[..., None], 0) for n in ("hidden", "ref_hidden")}

    logarithms = 1 + 2 * (head.largest + reference.largest + math.log(1 + vocab))
    off = head.off(dtype) + reference.off(ref_dtype) + reference.off(dtype)
    bounds = off_by(head, off, logarithms, rows)
    for which in (head, reference):
        unread(draw, which, ignored, own)
    dtypes = {"labels": [torch.int32, *NOT_INDICES], **head.dtypes(), **reference.dtypes()}
    call = general_call(draw, "linear_kl", head, own, shape, bounds, dtypes, read)
    call.bad += [*reference.bad(draw), draw.length("ref_weight", 0)]
    call.bad += [draw.scalar(name, draw.one(*NO_CHOICE), ValueError) for name in ("direction", "reduction")]
    call.bad.append(draw.scalar("ignore_index", draw.one(*NO_IGNORE_INDEX), ValueError))
    if own["labels"] is not None:
        call.bad += [draw.length("labels", dim) for dim in range(len(lead))]
    return call


def linear_cross_entropy(draw: Draw) -> Call:
    head, vocab, _ = one_head(draw)
    lead, shift = head.lead, draw.chance(0.5)
    kept = (*lead[:-1], max(lead[-1] - 1, 0)) if shift else lead
    reduction, shape, rows = reduced(draw, kept)
    head.rows = math.prod(kept)
    ignore_index = draw.one(-100, -100, 0, *EXTREMES)
    labels = drawn_labels(draw, lead, vocab, ignore_index)
    own = {"labels": labels, "shift": shift, "ignore_index": ignore_index, "reduction": reduction}

    def ignored(a: Arguments) -> Tensor:
        found = a["labels"] == a["ignore_index"]
        return torch.cat([found[..., 1:], torch.ones_like(found[..., :1])], -1) if a["shift"] else found

    def read(a: Arguments) -> Arguments:
        return a | {"hidden": a["hidden"].masked_fill(ignored(a)[..., None], 0)}

    bounds = off_by(head, head.off(head.dtype), 1 + 2 * head.largest + math.log(1 + vocab), rows)
    unread(draw, head, ignored, own)
    dtypes = {"labels": [torch.int32, *NOT_INDICES], **head.dtypes()}
    call = general_call(draw, "linear_cross_entropy", head, own, shape, bounds, dtypes, read)
    call.bad += [draw.length("labels", dim) for dim in range(len(lead))]
    call.bad.append(draw.scalar("reduction", draw.one(*NO_CHOICE), ValueError))
    call.bad.append(draw.scalar("ignore_index", draw.one(*NO_IGNORE_INDEX), ValueError))
    if labels.numel() and (not shift or lead[-1] > 1):
        call.bad.append(draw.value("labels", vocab, IndexError, ignore=ignore_index))
    return call


OPS = [linear_topk_logits, linear_topk_log_probs, linear_topk_kl, linear_kl, linear_cross_entropy]
