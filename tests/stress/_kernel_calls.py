"""Calls of the ops that have a kernel of their own: random arguments, and the truth about them."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from _call import Arguments, Bad, Call, for_twin, loss_and_gradients
from _draw import EXTREMES, NOT_FLOATS, NOT_INDICES, TARGETS, Draw, eps, largest, other
from torch import Tensor

from palu import eager, ops
from palu.eager import acc_dtype
from palu.ops import fused
from palu.ops.functional import use_gather

raw = torch.ops.palu


def prefix_mask(draw: Draw) -> Call:
    shape = draw.size(), draw.size()
    values = torch.tensor(draw.random.choices([0, 1, 2, 7, -1, -100, -200, *EXTREMES], k=shape[0] * shape[1]))
    labels = draw.place(values.to(torch.int64).view(shape), lambda: 1)
    call = Call(
        "prefix_mask",
        lambda a: [ops.prefix_mask(**a)],
        lambda a: [eager.prefix_mask(**a)],
        {
            "labels": labels,
            "n": draw.one(-1, 0, 1, 2, 3, 1000, 2**63 - 1),
            "eos_token_id": draw.one(None, 2, *EXTREMES),
        },
    )
    call.bad = draw.common(call, {"labels": [torch.int32, *NOT_INDICES]})
    call.bad += [
        draw.scalar("n", draw.one(-2, -(2**63)), ValueError),
        draw.scalar("n", draw.one(1.5, None, 2**63), TypeError),
    ]
    call.bad += [draw.scalar("eos_token_id", draw.one(1.5, "2", -(2**64)), TypeError)]
    return call


def bad_index(draw: Draw, index: Tensor, vocab: int) -> list[Bad]:
    if not index.numel():
        return []
    none = Bad("K = 0", lambda a: a.update(index=a["index"][:, :0]), (ValueError,))
    return [draw.value("index", vocab, IndexError), *([none] if vocab else [])]


def bad_target(draw: Draw) -> list[Bad]:
    unknown = draw.one("mean", "constant", "", "GLOBAL_MEAN", None, [1.0], 1j, math.nan, True)
    return [draw.scalar("target", unknown, ValueError)]


def topk_mse(draw: Draw) -> Call:
    rows, vocab, k = draw.rows_and_vocabulary()
    dtype, target = draw.floating(), draw.one(*TARGETS)
    wanted = ["logits"] if draw.chance(0.8) else []
    arguments: Arguments = {
        "logits": draw.normal((rows, vocab), dtype),
        "index": draw.integers((rows, k), vocab, draw.one(torch.int32, torch.int64)),
        "target": target,
    }
    if wanted:
        arguments["grad"] = draw.normal((rows,), acc_dtype(dtype))
    scale = 1 + 2 * largest(arguments["logits"]) + (0 if isinstance(target, str) else abs(target))
    call = Call(
        "topk_mse",
        lambda a: loss_and_gradients(ops.topk_mse, a, wanted, "create_graph" in a),
        lambda a: loss_and_gradients(eager.topk_mse, for_twin(a), wanted),
        arguments,
        error=256 * eps(acc_dtype(dtype)) * scale**2 * (1 + largest(arguments.get("grad"))),
    )
    grad = arguments.pop("grad", None)  # autograd's own checks cover it
    call.bad = draw.common(call, {"logits": NOT_FLOATS, "index": NOT_INDICES})
    if grad is not None:
        arguments["grad"] = grad
        call.bad.append(Bad("create_graph", lambda a: a.update(create_graph=True), (RuntimeError,)))
    call.bad += [draw.length("logits", 0), draw.length("index", 0)]
    call.bad += bad_index(draw, arguments["index"], vocab) + bad_target(draw)
    if rows:
        call.bad.append(Bad("V = 0", lambda a: a.update(logits=a["logits"][:, :0]), (ValueError,)))
    return call


def linear_arguments(draw: Draw) -> tuple[Arguments, tuple[int, int, int, int], torch.dtype]:
    rows, vocab, k = draw.rows_and_vocabulary()
    d, dtype = draw.size(), draw.floating()
    arguments = {
        "hidden": draw.normal((rows, d), dtype),
        "weight": draw.normal((vocab, d), dtype),
        "index": draw.integers((rows, k), vocab, draw.one(torch.int32, torch.int64)),
    }
    return arguments, (rows, vocab, k, d), dtype


def bad_linear(draw: Draw, a: Arguments, vocab: int) -> list[Bad]:
    found = [draw.length("hidden", 0), draw.length("hidden", 1), draw.length("weight", 1), draw.length("index", 0)]
    if a["weight_mean"] is not None:
        found.append(draw.length("weight_mean", 0))
    return found + bad_index(draw, a["index"], vocab)


def linear_topk_mse(draw: Draw) -> Call:
    arguments, (rows, vocab, k, _), dtype = linear_arguments(draw)
    hidden, weight, acc = arguments["hidden"], arguments["weight"], acc_dtype(dtype)
    target = draw.one(*TARGETS)
    bias = draw.normal((vocab,), dtype) if draw.chance(0.5) else None
    mean = draw.place(weight.double().mean(0).to(acc), lambda: math.nan) if draw.chance(0.3) else None
    if mean is not None and 0 in mean.stride() and mean.numel() > 1:
        mean = ops.weight_mean(weight)  # expanded, it would be another
    wanted = [
        name for name in ("hidden", "weight", "bias") if draw.chance(0.6) and (name != "bias" or bias is not None)
    ]
    impl = draw.one("auto", "gather", "dense")
    arguments |= {"target": target, "bias": bias, "weight_mean": mean, "impl": impl}
    bound = largest(hidden.double().abs() @ weight.double().abs().t()) + largest(bias)
    scale = 1 + 2 * bound + (0 if isinstance(target, str) else abs(target))
    grad = draw.normal((hidden.shape[0],), acc)
    through = (1 + largest(hidden)) * (1 + largest(weight)) * (1 + rows)
    # The dense product rounds the logits, and their gradient, to their dtype; with a bias torch may round twice.
    dense = not use_gather(impl, rows, k, vocab, "cpu")
    rounding = 256 * eps(acc) + (4 * eps(dtype) if dense else 0)
    call = Call(
        "linear_topk_mse",
        lambda a: loss_and_gradients(ops.linear_topk_mse, a, wanted, "create_graph" in a),
        lambda a: loss_and_gradients(eager.linear_topk_mse, for_twin(a), wanted),
        arguments,
        error=rounding * (scale**2 + scale * (1 + largest(grad)) * through),
    )
    call.bad = draw.common(
        call,
        {
            "hidden": NOT_FLOATS,
            "weight": other(dtype),
            "index": NOT_INDICES,
            "bias": other(dtype),
            "weight_mean": other(acc),
        },
    )
    call.bad += bad_linear(draw, arguments, vocab) + bad_target(draw)
    call.bad.append(draw.scalar("impl", draw.one("", "Dense", None), ValueError))
    if bias is not None:
        call.bad.append(draw.length("bias", 0))
    if wanted:
        arguments["grad"] = grad
        call.bad.append(Bad("create_graph", lambda a: a.update(create_graph=True), (RuntimeError,)))
    return call


def logit_gradient(a: Arguments, vocab: int) -> Tensor:
    """[R, V] in float64, from the backward ops' arguments."""
    index, residual = a["index"].long(), a["residual"].double()
    g = 2 / max(index.shape[1], 1) * a["grad"].double()[:, None] * residual
    gradient = torch.zeros(index.shape[0], vocab, dtype=torch.float64).scatter_add_(1, index, g)
    return gradient - g.sum(1, keepdim=True) / vocab if a["through_mean"] and vocab else gradient


def bad_incoming(draw: Draw, a: Arguments) -> list[Bad]:
    return [draw.length("grad", 0), draw.length("residual", 0), draw.length("residual", 1)]


def topk_mse_backward(draw: Draw) -> Call:
    rows, vocab, k = draw.rows_and_vocabulary()
    dtype = draw.floating()
    acc = acc_dtype(dtype)
    arguments: Arguments = {
        "grad": draw.normal((rows,), acc),
        "residual": draw.normal((rows, k), acc),
        "index": draw.integers((rows, k), vocab, draw.one(torch.int32, torch.int64)),
        "through_mean": draw.chance(0.5),
        "grad_logits": draw.normal((rows, vocab), dtype, buffer=True),
    }
    call = Call(
        "topk_mse_backward",
        lambda a: [raw.topk_mse_backward(**a)][1:],
        lambda a: [logit_gradient(a, a["grad_logits"].shape[1])],
        arguments,
        written=["grad_logits"],
        error=256 * eps(acc) * (1 + largest(arguments["grad"]) * largest(arguments["residual"])),
    )
    call.bad = draw.common(
        call, {"grad": other(acc), "residual": other(acc), "index": NOT_INDICES, "grad_logits": NOT_FLOATS}
    )
    call.bad += bad_incoming(draw, arguments) + bad_index(draw, arguments["index"], vocab)
    call.bad += [draw.length("index", 0), draw.length("grad_logits", 0)]
    return call


def linear_topk_mse_backward(draw: Draw) -> Call:
    arguments, (rows, vocab, k, d), dtype = linear_arguments(draw)
    acc, weight = acc_dtype(dtype), arguments["weight"]
    through_mean = draw.chance(0.5)
    shapes = {"grad_hidden": (rows, d), "grad_weight": (vocab, d), "grad_bias": (vocab,)}
    buffers = {n: draw.normal(s, dtype, buffer=True) if draw.chance(0.7) else None for n, s in shapes.items()}
    needed = through_mean and buffers["grad_hidden"] is not None
    mean = weight.double().mean(0).to(acc) if needed or draw.chance(0.3) else None
    arguments |= {
        "grad": draw.normal((rows,), acc),
        "residual": draw.normal((rows, k), acc),
        "weight_mean": mean,
        "through_mean": through_mean,
        **buffers,
    }

    def truth(a: Arguments) -> list[Tensor]:
        z = logit_gradient(a, vocab)
        gradients = {"grad_hidden": z @ a["weight"].double(), "grad_weight": z.t() @ a["hidden"].double()}
        gradients["grad_bias"] = z.sum(0)
        return [a[name].double() + gradients[name] for name in call.written]

    incoming = 2 * largest(arguments["grad"]) * largest(arguments["residual"])
    scale = (1 + largest(arguments["hidden"], weight)) * (1 + rows)
    call = Call(
        "linear_topk_mse_backward",
        lambda a: [raw.linear_topk_mse_backward(**a)][1:],
        truth,
        arguments,
        written=[name for name, buffer in buffers.items() if buffer is not None],
        error=256 * eps(acc) * (1 + incoming) * scale,
    )
    dtypes = {name: other(dtype) for name in ("weight", *shapes)}
    dtypes |= {"hidden": NOT_FLOATS, "index": NOT_INDICES}
    dtypes |= {name: other(acc) for name in ("grad", "residual", "weight_mean")}
    call.bad = draw.common(call, dtypes) + bad_incoming(draw, arguments) + bad_linear(draw, arguments, vocab)
    call.bad += [draw.length(name, dim) for name in call.written for dim in range(len(shapes[name]))]
    if needed:
        call.bad.append(draw.scalar("weight_mean", None, ValueError))
    return call


def rowwise(draw: Draw) -> tuple[Tensor, Tensor, torch.dtype]:
    rows, vocab, _ = draw.rows_and_vocabulary()
    dtype = draw.floating()
    return draw.normal((rows, vocab), dtype, buffer=True), draw.normal((rows,), acc_dtype(dtype)), dtype


def no_vocabulary(logits: Tensor, **others: Any) -> list[Bad]:
    def change(a: Arguments) -> None:
        for name in ("logits", "ref_logits"):
            if name in a:
                a[name] = a[name][:, :0]

    return [Bad("V = 0", change, (ValueError,))] if logits.shape[0] else []


def cross_entropy_(draw: Draw) -> Call:
    logits, row_weight, dtype = rowwise(draw)
    rows, vocab = logits.shape
    labels = draw.integers((rows,), vocab)

    def truth(a: Arguments) -> list[Tensor]:
        z = a["logits"].double()
        if not z.shape[0]:
            return [z.new_empty(0), z]
        one_hot = F.one_hot(a["labels"], vocab)
        loss = F.cross_entropy(z, a["labels"], reduction="none")
        return [loss, (z.softmax(1) - one_hot) * a["row_weight"].double()[:, None]]

    call = Call(
        "cross_entropy_",
        lambda a: [ops.cross_entropy_(**a)],
        truth,
        {"logits": logits, "labels": labels, "row_weight": row_weight},
        written=["logits"],
        error=256 * eps(acc_dtype(dtype)) * (1 + largest(logits)) * (1 + largest(row_weight)),
    )
    call.bad = draw.common(
        call,
        {"logits": NOT_FLOATS, "labels": [torch.int32, *NOT_INDICES], "row_weight": other(row_weight.dtype)},
    )
    call.bad += [draw.length(name, 0) for name in ("logits", "labels", "row_weight")] + no_vocabulary(logits)
    if rows:
        call.bad.append(draw.value("labels", vocab, IndexError, RuntimeError))  # torch's own
    return call


def unlikelihood_(draw: Draw) -> Call:
    logits, row_weight, dtype = rowwise(draw)
    if logits.shape[1] < 2:
        return cross_entropy_(draw)
    rows, vocab = logits.shape
    labels, floor = draw.integers((rows,), vocab), draw.random.choice((0.0, 0.3))

    def truth(a: Arguments) -> list[Tensor]:
        z, label = a["logits"].double(), a["labels"][:, None]
        others = z.scatter(1, label, float("-inf"))
        margin = z.gather(1, label)[:, 0] - others.logsumexp(1)
        pushed = margin.sigmoid() > a["floor"]
        weight = (a["row_weight"].double() * margin.sigmoid() * pushed)[:, None]
        return [F.softplus(margin, threshold=1e9) * pushed, (-weight * others.softmax(1)).scatter(1, label, weight)]

    call = Call(
        "unlikelihood_",
        lambda a: [ops.unlikelihood_(**a)],
        truth,
        {"logits": logits, "labels": labels, "row_weight": row_weight, "floor": floor},
        written=["logits"],
        error=256 * eps(acc_dtype(dtype)) * (1 + largest(logits)) * (1 + largest(row_weight)),
    )
    call.bad = draw.common(
        call,
        {"logits": NOT_FLOATS, "labels": [torch.int32, *NOT_INDICES], "row_weight": other(row_weight.dtype)},
    )
    call.bad += [draw.length(name, 0) for name in ("logits", "labels", "row_weight")] + no_vocabulary(logits)
    if rows:
        call.bad.append(draw.value("labels", vocab, IndexError, RuntimeError))  # torch's own
    return call


def kl_div_(draw: Draw) -> Call:
    logits, row_weight, dtype = rowwise(draw)
    ref_logits = draw.normal(logits.shape, dtype)

    def truth(a: Arguments) -> list[Tensor]:
        log_p, log_q = a["logits"].double().log_softmax(1), a["ref_logits"].double().log_softmax(1)
        p, q = log_p.exp(), log_q.exp()
        if a["reverse"]:
            loss = (p * (log_p - log_q)).sum(1)
            gradient = p * (log_p - log_q - loss[:, None])
        else:
            loss, gradient = (q * (log_q - log_p)).sum(1), p - q
        return [loss, gradient * a["row_weight"].double()[:, None]]

    call = Call(
        "kl_div_",
        lambda a: [ops.kl_div_(**a)],
        truth,
        {"logits": logits, "ref_logits": ref_logits, "row_weight": row_weight, "reverse": draw.chance(0.5)},
        written=["logits"],
        error=256 * eps(acc_dtype(dtype)) * (1 + largest(logits, ref_logits)) * (1 + largest(row_weight)),
    )
    call.bad = draw.common(
        call, {"logits": NOT_FLOATS, "ref_logits": other(dtype), "row_weight": other(row_weight.dtype)}
    )
    call.bad += [draw.length(name, dim) for name in ("logits", "ref_logits") for dim in (0, 1)]
    call.bad += [draw.length("row_weight", 0), *no_vocabulary(logits)]
    return call


def scale_(draw: Draw) -> Call:
    shape = tuple(draw.size() for _ in range(draw.random.randint(1, 2)))
    dtype = draw.floating()
    tensor = draw.normal(shape, dtype, buffer=True).contiguous()
    factor = torch.tensor(draw.one(1.0, 0.0, -2.5), dtype=draw.one(torch.float32, torch.float64))

    def run(a: Arguments) -> list[Tensor]:
        fused.scale_(**a)
        return []

    call = Call(
        "scale_",
        run,
        lambda a: [a["tensor"].double() * a["factor"].double()],
        {"tensor": tensor, "factor": factor},
        written=["tensor"],
    )
    call.bad = [draw.dtype("tensor", NOT_FLOATS), draw.dtype("factor", [torch.bfloat16, *NOT_FLOATS])]
    call.bad += [Bad("factor of one dimension", lambda a: a.update(factor=a["factor"][None]), (ValueError,))]
    call.bad += [*map(draw.device, call.tensors()), draw.sparse("tensor"), *draw.buffers(call)]
    return call


OPS = [
    prefix_mask,
    topk_mse,
    topk_mse_backward,
    linear_topk_mse,
    linear_topk_mse_backward,
    cross_entropy_,
    unlikelihood_,
    kl_div_,
    scale_,
]
