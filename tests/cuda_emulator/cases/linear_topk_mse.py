"""Cases of linear_topk_mse and its three gradients.

Forward a warp for each candidate, then a block for each row; the gradient of hidden in slices of K, those of weight
and bias by vocabulary entry.
"""

from collections.abc import Iterator
from typing import Any

import torch
from compare import acc_dtype
from machine import Case, Output, Phase, Placed
from torch import Tensor

from cases.draw import DTYPES, Draw, Fixed, center, short
from palu import eager


def fixed(dtype: torch.dtype) -> Iterator[Fixed]:
    """Yield a case for each path of the kernels."""
    pack = 16 // dtype.itemsize
    plain = {"target": "global_mean", "bias": True, "wanted": (True, True, True), "lead": 0, "pad": 0}
    small = plain | {"index_dtype": torch.int32, "kind": "any"}
    wide = small | {"index_dtype": torch.int64}
    yield Fixed("no-rows", "no launch", small | {"rows": 0, "vocabulary": 9, "size": 8, "k": 3})
    yield Fixed("no-columns", "hidden of no columns", wide | {"rows": 2, "vocabulary": 9, "size": 0, "k": 3})
    yield Fixed(
        "packed",
        "16 bytes an access; a second block for the bias; a second slice of K, not full",
        small | {"rows": 3, "vocabulary": 260, "size": 8 * pack, "k": 33},
    )
    yield Fixed(
        "packed-apart",
        "16 bytes an access, rows of weight and its gradient apart; no bias; fewer candidates than warps of a block",
        wide | {"rows": 2, "vocabulary": 31, "size": 2 * pack, "k": 3, "pad": pack, "bias": False},
    )
    yield Fixed(
        "single",
        "an element an access: the rows have no multiple of 16 bytes",
        small | {"rows": 3, "vocabulary": 31, "size": 2 * pack + 1, "k": 40},
    )
    yield Fixed(
        "single-unaligned",
        "an element an access: the weight begins within 16 bytes; entries that no row has",
        wide | {"rows": 2, "vocabulary": 300, "size": 2 * pack, "k": 7, "lead": 1, "target": "global_mean_detached"},
    )
    yield Fixed(
        "unrolled",
        "8 loads in flight and a rest; a second block of columns for the gradient of hidden, not full",
        small | {"rows": 2, "vocabulary": 12, "size": (256 + 40) * pack, "k": 9},
    )
    yield Fixed(
        "unrolled-single",
        "the same, an element an access",
        wide | {"rows": 1, "vocabulary": 12, "size": 256 + 41, "k": 9},
    )
    yield Fixed(
        "long-k",
        "more candidates than threads of a block: their loops run twice; ten slices of K",
        wide | {"rows": 1, "vocabulary": 31, "size": pack, "k": 300, "target": "local_mean"},
    )
    yield Fixed(
        "several-chunks",
        "so many rows that a block sums two chunks of 32 candidates, the second of one (backward alone)",
        small | {"rows": 1024, "vocabulary": 40, "size": pack, "k": 33, "wanted": (True, False, False), "only": True},
    )
    for number, target in enumerate(("global_mean_detached", "local_mean", 0.5, "global_mean")):
        wanted = [number != 0, number != 1, number != 2]  # a gradient of the three is not asked for
        sizes = {"rows": 3, "vocabulary": 20, "size": pack, "k": 5, "target": target, "wanted": wanted}
        yield Fixed(f"target-{target}", "the center; a gradient that is not asked for", small | sizes)


def make(
    draw: Draw,
    *,
    dtype: torch.dtype | None = None,
    rows: int | None = None,
    vocabulary: int | None = None,
    size: int | None = None,
    k: int | None = None,
    target: str | float | None = None,
    index_dtype: torch.dtype | None = None,
    kind: str | None = None,
    bias: bool | None = None,
    wanted: tuple[bool, bool, bool] | None = None,
    lead: int | None = None,
    pad: int | None = None,
    only: bool = False,
) -> Case:
    """Make a case of hidden [rows, size] and weight [vocabulary, size] with K candidates a row.

    `wanted`: which gradients, of hidden, weight and bias. `lead` and `pad` are those of weight, and `pad` that of its
    gradient. `only`: the gradients alone, with the residual given.
    """
    size = int(draw.one(0, 1, 7, 8, 16, 64, 65, 256, 576, 2047, 2048, 4096)) if size is None else size
    if vocabulary is None:
        vocabulary = draw.random.randint(1, 60) if size > 600 else int(draw.one(1, 5, 31, 257, 1000, 4099))
    k = k or int(draw.one(1, 2, 7, 31, 32, 33, 40, 65, 100, 300))
    rows = int(draw.one(0, 1, 1, 2, 3, 5, 9)) if rows is None else rows
    dtype = dtype or draw.one(*DTYPES)
    target = draw.target() if target is None else target
    h = (torch.randn(rows, size) * draw.one(1, 1, 5)).to(dtype)
    w = (torch.randn(vocabulary, size) * draw.one(0.02, 1) + draw.one(0, 0, 0.1)).to(dtype)
    bias = draw.chance(0.5) if bias is None else bias
    b = torch.randn(vocabulary).to(dtype) if bias else None
    at, kind = draw.index(rows, vocabulary, k, index_dtype or draw.one(torch.int32, torch.int64), kind)
    incoming = torch.randn(rows, dtype=acc_dtype(dtype))
    through = target == "global_mean"
    wanted = wanted or (draw.chance(0.8), draw.chance(0.8), draw.chance(0.8))
    of_hidden, of_weight, of_bias = wanted[0], wanted[1], wanted[2] and bias
    start = [None if t is None else (torch.randn_like(t.float()) * draw.one(0, 0.1)).to(dtype) for t in (h, w, b)]
    apart = draw.one(0, 0, 0, 1, 8, 16) if pad is None else pad
    lead = draw.one(0, 0, 0, 1, 8) if lead is None else lead

    def twin(dtype: torch.dtype) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        hidden, weight = (t.to(dtype, copy=True).requires_grad_() for t in (h, w))
        bias = None if b is None else b.to(dtype, copy=True).requires_grad_()
        total = eager.linear_topk_mse(hidden, weight, at, target, bias)
        if rows:
            total.backward(incoming.to(total.dtype))
        gradients = [
            None if s is None else s.to(dtype) + (0 if leaf is None or leaf.grad is None else leaf.grad)
            for leaf, s in zip((hidden, weight, bias), start, strict=True)
        ]
        logits = torch.nn.functional.linear(hidden, weight, bias).detach()
        return total.detach(), eager.topk_residual(logits, at, target), gradients

    true_loss, true_residual, true_gradients = twin(torch.float64)
    loss, residual, gradients = twin(dtype)

    acc = acc_dtype(dtype)
    where, constant = center(target)
    is_global = where == 0
    tensors: dict[str, Placed | None] = {
        "hidden": Placed("hidden", h, lead=draw.one(0, 0, 0, 1) if pad is None else 0),
        "weight": Placed("weight", w, lead=lead, stride=size + apart),
        "index": Placed("index", at),
        "bias": None if b is None else Placed("bias", b),
        "weight_mean": Placed("weight_mean", w.mean(0, dtype=acc)) if is_global else None,
        "bias_mean": Placed("bias_mean", b.mean(0, dtype=acc).reshape(1)) if is_global and b is not None else None,
        "loss": Placed("loss", None, (rows,), acc),
        "residual": Placed("residual", true_residual.to(acc)) if only else Placed("residual", None, (rows, k), acc),
        "grad": Placed("grad", incoming),
        "shift": Placed("shift", None, (rows,), acc) if through else None,
        "partial": Placed("partial", None, (_slices(rows, k) * rows, size), acc) if of_hidden else None,
        "sorted_index": None,
        "sorted_order": None,
        "offsets": None,
        "mean_row": Placed("mean_row", None, (size,), acc) if through and of_weight else None,
        "grad_hidden": Placed("grad_hidden", start[0], stride=size + draw.one(0, 0, 3)) if of_hidden else None,
        "grad_weight": None,
        "grad_bias": Placed("grad_bias", start[2]) if of_bias else None,
    }
    if of_weight or of_bias:
        ordered, order = torch.sort(at.flatten(), stable=True)
        tensors["sorted_index"], tensors["sorted_order"] = (
            Placed("sorted_index", ordered),
            Placed("sorted_order", order),
        )
        tensors["offsets"] = Placed("offsets", None, (vocabulary + 1,), torch.int64)
    if of_weight:
        stride = size + (draw.one(0, 0, 3, 8) if pad is None else pad)
        tensors["grad_weight"] = Placed("grad_weight", start[1], stride=stride)
    numbers = {"dtype": DTYPES.index(dtype), "index64": at.dtype == torch.int64, "constant": constant, "center": where}
    numbers |= {"rows": rows, "vocab_size": vocabulary, "hidden_size": size, "k": k}
    numbers |= {f"{name}_stride": p.stride for name, p in tensors.items() if p is not None}

    def phase(launcher: str, writes: list[str], fresh: list[str]) -> Phase:
        members: dict[str, Any] = {name: numbers.get(name, 0) for name in _MEMBERS[launcher == "linear_topk_mse"]}
        members |= {name: tensors[name] for name in members if name in tensors}
        return Phase(launcher, members, writes, fresh)

    phases = [] if only else [phase("linear_topk_mse", ["loss", "residual"], ["loss", "residual"])]
    if through:
        phases.append(phase("linear_mean_shift", ["shift"], ["shift"]))
    if of_hidden:
        phases.append(phase("linear_grad_hidden", ["partial", "grad_hidden"], ["partial"]))
    if of_weight or of_bias:
        written = ["offsets", "mean_row", "grad_weight", "grad_bias"]
        phases.append(phase("linear_grad_weight", written, ["offsets", "mean_row"]))

    outputs = []
    if rows:
        # Sums of products: errors are relative to the sum of their sizes.
        h64, w64 = h.double().abs(), w.double().abs()
        sizes = (h64 @ w64.t() + (b.double().abs() if b is not None else 0)).amax(1)
        off = torch.maximum(true_residual.abs().amax(1), torch.finfo(acc).eps * sizes)
        g = incoming.double().abs() * torch.maximum(off, sizes) * 4
        scales = {
            "loss": true_loss + sizes * off,
            "residual": sizes,
            "grad_hidden": g[:, None].expand(rows, 1) * (w64.max() if size else 0),
            "grad_weight": (g[:, None] * k * h64).sum() * torch.ones(vocabulary),
            "grad_bias": (g * k).sum() * torch.ones(vocabulary),
        }
        true, same = (true_loss, true_residual, *true_gradients), (loss, residual, *gradients)
        for (name, scale), truth, plain in zip(scales.items(), true, same, strict=True):
            placed = tensors[name]
            if placed is not None and truth is not None and not (only and name in ("loss", "residual")):
                outputs.append(Output(placed, truth, plain, scale))
    text = (
        f"{short(dtype)} R {rows} V {vocabulary} d {size} K {k} {target}, bias {bias}, weight +{lead} "
        f"stride {size + apart}, index {short(at.dtype)} {kind}, gradients {[of_hidden, of_weight, of_bias]}"
    )
    return Case(text, [p for p in tensors.values() if p is not None], phases, outputs)


def _slices(rows: int, k: int) -> int:
    """How many slices of K linear_grad_hidden sums in, as in linear_topk_mse.cu; partial has as many."""
    return min(-(-1024 // rows), -(-k // 32)) if rows else 1


_BOTH = ["dtype", "index64", "hidden", "weight", "weight_stride", "index", "weight_mean", "residual"]
_BOTH += ["rows", "vocab_size", "hidden_size", "k"]
_FORWARD = [*_BOTH, "bias", "bias_mean", "loss", "center", "constant"]
_BACKWARD = [*_BOTH, "grad", "shift", "partial", "grad_hidden", "grad_hidden_stride", "sorted_index", "sorted_order"]
_BACKWARD += ["offsets", "mean_row", "grad_weight", "grad_weight_stride", "grad_bias"]
_MEMBERS = {True: _FORWARD, False: _BACKWARD}  # of the structs, by whether it is the forward pass
