"""The fixed cases of every op: their sizes are chosen so that a kernel takes a certain path."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Fixed:
    """Sizes and places, arguments of the op's function in launches.py; the rest is drawn."""

    name: str
    path: str  # what it is for
    sizes: dict[str, Any] = field(default_factory=dict)


def prefix_mask(_: torch.dtype) -> Iterator[Fixed]:
    """Yield a case for each path of the kernel."""
    plain = {"batch": 5, "n": 3, "gaps": 0.1, "place": "rows"}
    yield Fixed("no-rows", "no launch", plain | {"batch": 0, "length": 9})
    yield Fixed("no-columns", "no launch", plain | {"length": 0})
    yield Fixed("one-label", "31 lanes past the row; a block with one row of four", plain | {"length": 1})
    yield Fixed("whole-step", "a step without a lane past the row", plain | {"length": 32})
    yield Fixed("past-a-step", "a second step with one label", plain | {"length": 33})
    yield Fixed("whole-load", "all 8 steps of a load", plain | {"length": 256})
    yield Fixed("past-a-load", "a second load with one label", plain | {"length": 257})
    long = {"batch": 4, "length": 700, "gaps": 0.0, "place": "rows", "eos": None}
    yield Fixed("open-span", "a span that is open over steps and loads, and ends in the last", long | {"n": 600})
    yield Fixed("whole-spans", "n = -1", long | {"n": -1, "gaps": 0.005})
    yield Fixed("nothing", "n = 0", long | {"n": 0})
    yield Fixed("largest-n", "n near the end of int64", long | {"n": 2**63 - 1})
    for place in ("transposed", "steps", "expanded"):
        yield Fixed(place, "strides of views", {"batch": 6, "length": 70, "n": 3, "gaps": 0.1, "place": place})
    yield Fixed("end-of-text", "spans that eos ends", plain | {"length": 100, "eos": 2, "gaps": 0.0})


def topk_mse(dtype: torch.dtype) -> Iterator[Fixed]:
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


def linear_topk_mse(dtype: torch.dtype) -> Iterator[Fixed]:
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


def linear_topk_unlikelihood(dtype: torch.dtype) -> Iterator[Fixed]:
    """Yield a case for each path of the kernel that makes losses of the gathered logits."""
    size = 2 * 16 // dtype.itemsize
    plain = {"size": size, "bias": True, "wanted": (True, True, True), "lead": 0, "pad": 0}
    small = plain | {"index_dtype": torch.int32, "kind": "any"}
    wide = plain | {"index_dtype": torch.int64, "kind": "any"}
    yield Fixed("no-rows", "no launch", small | {"rows": 0, "vocabulary": 9, "k": 3})
    yield Fixed("one-candidate", "K = 2", wide | {"rows": 5, "vocabulary": 31, "k": 2, "kind": "unique"})
    yield Fixed("any", "the true token and others more than once", small | {"rows": 3, "vocabulary": 20, "k": 60})
    yield Fixed(
        "alone", "no candidate but the true token", wide | {"rows": 2, "vocabulary": 9, "k": 40, "kind": "one value"}
    )
    yield Fixed("long-k", "more candidates than threads of a block", small | {"rows": 2, "vocabulary": 700, "k": 600})


def softmax_loss(dtype: torch.dtype, rows_read: int) -> Iterator[Fixed]:
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
