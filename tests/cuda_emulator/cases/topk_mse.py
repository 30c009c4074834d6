"""Cases of topk_mse and its gradient: a block for each row forward, one for each tile of 64 KiB backward."""

from collections.abc import Iterator

import torch
from compare import acc_dtype
from machine import Case, Output, Phase, Placed
from torch import Tensor

from cases.draw import DTYPES, Draw, Fixed, center, short
from palu import eager


def fixed(dtype: torch.dtype) -> Iterator[Fixed]:
    """Yield a case for each path of the kernels."""
    pack = 16 // dtype.itemsize
    tile = 64 * 1024 // dtype.itemsize
    small = {"target": "global_mean", "index_dtype": torch.int32, "kind": "unique", "values": "normal", "lead": 0}
    wide = small | {"index_dtype": torch.int64}
    yield Fixed("no-rows", "no launch", small | {"rows": 0, "vocabulary": 9, "k": 3})
    yield Fixed("one-entry", "a row of one entry", small | {"rows": 3, "vocabulary": 1, "k": 1, "pad": 0})
    yield Fixed(
        "within-a-pack",
        "rows shorter than 16 bytes, that begin and end anywhere in them",
        wide | {"rows": 9, "vocabulary": max(pack - 1, 1), "k": 1, "lead": pack - 1, "pad": 1},
    )
    yield Fixed(
        "whole-tile", "one tile that is full", small | {"rows": 2, "vocabulary": tile, "k": 9, "pad": 0, "edges": True}
    )
    yield Fixed(
        "tile-edges",
        "a tile begun before the row, candidates at both sides of a tile's end, a gap after each row",
        wide | {"rows": 2, "vocabulary": tile + pack, "k": 40, "lead": pack - 1, "pad": pack + 1, "edges": True},
    )
    yield Fixed(
        "tile-unaligned",
        "a row as long as a tile, begun within 16 bytes: its last elements are a second tile",
        wide | {"rows": 1, "vocabulary": tile, "k": 9, "lead": 1, "pad": 0},
    )
    yield Fixed(
        "second-stream",
        "a row longer than 1024 threads times 4 packs: the loop over packs runs twice",
        small | {"rows": 1, "vocabulary": 1024 * 4 * pack + 5, "k": 7, "lead": 1, "pad": 0},
    )
    yield Fixed(
        "kept-index",
        "K = 5 * 1024: the most that stays in registers; the tile's loop over K runs three times",
        small | {"rows": 1, "vocabulary": 6007, "k": 5120, "pad": 3},
    )
    yield Fixed(
        "reread-index", "K = 5 * 1024 + 1: read again", wide | {"rows": 1, "vocabulary": 6007, "k": 5121, "pad": 0}
    )
    yield Fixed(
        "repeats",
        "entries that occur more than once, of which many in a warp: summed by the warp that owns them",
        small | {"rows": 2, "vocabulary": 37, "k": 600, "kind": "any", "pad": 1},
    )
    yield Fixed(
        "one-value",
        "every candidate the same entry",
        wide | {"rows": 1, "vocabulary": 300, "k": 2100, "kind": "one value", "pad": 0},
    )
    for target in ("global_mean_detached", "local_mean", 0.5):
        yield Fixed(f"target-{target}", "the center", small | {"target": target, "rows": 3, "vocabulary": 300, "k": 40})


def make(
    draw: Draw,
    *,
    dtype: torch.dtype | None = None,
    rows: int | None = None,
    vocabulary: int | None = None,
    k: int | None = None,
    target: str | float | None = None,
    index_dtype: torch.dtype | None = None,
    kind: str | None = None,
    values: str | None = None,
    lead: int | None = None,
    pad: int | None = None,
    edges: bool = False,
) -> Case:
    """Make a case of logits [rows, vocabulary], whose rows are `pad` apart, with K candidates each.

    `edges`: candidates at both sides of a tile's end. K and the vocabulary must be larger than 4.
    """
    vocabulary = vocabulary or draw.vocabulary()
    rows = draw.rows(vocabulary) if rows is None else rows
    k = k or draw.k(vocabulary)
    dtype = dtype or draw.one(*DTYPES)
    target = draw.target() if target is None else target
    z, kind_of_logits = draw.logits(rows, vocabulary, dtype, values)
    at, kind = draw.index(rows, vocabulary, k, index_dtype or draw.one(torch.int32, torch.int64), kind)
    incoming = torch.randn(rows, dtype=acc_dtype(dtype)) * draw.one(1, 1e-3)
    if rows and draw.chance(0.3):
        incoming[draw.random.randrange(rows)] = 0
    logits = Placed("logits", z, **draw.layout(vocabulary, lead, pad))
    gradient = Placed("grad_logits", None, (rows, vocabulary), dtype, **draw.layout(vocabulary, lead, pad))
    if edges:
        _put_at_edges(at, gradient)
    index, grad = Placed("index", at), Placed("grad", incoming)
    loss = Placed("loss", None, (rows,), acc_dtype(dtype))
    residual = Placed("residual", None, (rows, k), acc_dtype(dtype))
    where, constant = center(target)
    both = {"dtype": DTYPES.index(dtype), "index64": at.dtype == torch.int64, "index": index, "residual": residual}
    both |= {"rows": rows, "vocab_size": vocabulary, "k": k}
    forward = both | {"logits": logits, "logits_stride": logits.stride, "loss": loss}
    forward |= {"center": where, "constant": constant}
    backward = both | {"grad": grad, "grad_logits": gradient, "grad_logits_stride": gradient.stride}
    backward |= {"through_mean": target == "global_mean"}
    phases = [
        Phase("topk_mse", forward, ["loss", "residual"], ["loss", "residual", "grad_logits"]),
        Phase("topk_mse_backward", backward, ["grad_logits"], ["grad_logits"]),
    ]

    def twin(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        leaf = values.clone().requires_grad_()
        total = eager.topk_mse(leaf, at, target)
        total.backward(incoming.to(total.dtype))
        assert leaf.grad is not None
        return total.detach(), eager.topk_residual(values, at, target), leaf.grad

    true, same = twin(z.double()), twin(z)
    # Beside rounding: a thread's sum for the mean is one of V/1024 terms, an entry that occurs often sums as many.
    eps = torch.finfo(acc_dtype(dtype)).eps
    size = torch.full((rows,), abs(constant), dtype=torch.float64)
    if rows:
        size = torch.maximum(size, z.double().abs().amax(1)) * (1 + vocabulary / 4096)
    off = true[1].abs().amax(1) if rows else size
    times = 1.0
    if rows:
        times = torch.zeros(rows, vocabulary).scatter_add_(1, at.long(), torch.ones(rows, k)).amax().item()
    if dtype == torch.float64:  # the truth is no better: it sums one term after the other
        times *= 1 + times / 64
    scales = [true[0] + size * off + eps * size**2, size, incoming.double().abs() * size * 2 / k * (2 + times)]
    outputs = [Output(p, *of) for p, *of in zip((loss, residual, gradient), true, same, scales, strict=True)]
    text = (
        f"{short(dtype)} [{rows}, {vocabulary}] K {k} {target}, logits {kind_of_logits} {logits.place()}, "
        f"gradient {gradient.place()}, index {short(at.dtype)} {kind}"
    )
    return Case(text, [logits, gradient, index, grad, loss, residual], phases, outputs)


def _put_at_edges(index: Tensor, gradient: Placed) -> None:
    """Put the last candidates of each row at its beginning, and at both sides of the first tile's end or the row's."""
    tile = 64 * 1024 // gradient.element
    for r in range(gradient.rows):
        before = (gradient.pointer // gradient.element + r * gradient.stride) % (16 // gradient.element)
        end = min(tile - before, gradient.columns - 1)
        row = index[r]
        for column, place in ((-1, end), (-2, end - 1), (-3, 0), (-4, 1)):
            row[row == place] = row[column]  # each once
            row[column] = place
