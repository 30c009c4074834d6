"""The fixed cases of every op: sizes and places with which a kernel takes a certain path, by the cases' names.

They are arguments of the op's function in launches.py; the rest is drawn.
"""

from typing import Any, TypeAlias

import torch

Cases: TypeAlias = dict[str, dict[str, Any]]


def prefix_mask(_: torch.dtype) -> Cases:
    """Return a case for each path of the kernel."""
    plain = {"batch": 5, "n": 3, "gaps": 0.1, "place": "rows"}
    long = {"batch": 4, "length": 700, "gaps": 0.0, "place": "rows", "eos": None}
    return {
        "no-rows": plain | {"batch": 0, "length": 9},  # no launch
        "no-columns": plain | {"length": 0},  # no launch
        "one-label": plain | {"length": 1},  # 31 lanes past the row; a block with one row of four
        "whole-step": plain | {"length": 32},  # a step without a lane past the row
        "past-a-step": plain | {"length": 33},  # a second step with one label
        "whole-load": plain | {"length": 256},  # all 8 steps of a load
        "past-a-load": plain | {"length": 257},  # a second load with one label
        "open-span": long | {"n": 600},  # a span that is open over steps and loads, and ends in the last
        "whole-spans": long | {"n": -1, "gaps": 0.005},
        "nothing": long | {"n": 0},
        "largest-n": long | {"n": 2**63 - 1},
        # strides of views
        **{place: plain | {"batch": 6, "length": 70, "place": place} for place in ("transposed", "steps", "expanded")},
        "end-of-text": plain | {"length": 100, "eos": 2, "gaps": 0.0},  # spans that eos ends
    }


def topk_mse(dtype: torch.dtype) -> Cases:
    """Return a case for each path of the kernels."""
    pack = 16 // dtype.itemsize
    tile = 56 * 1024 // dtype.itemsize
    small = {"target": "global_mean", "index_dtype": torch.int32, "kind": "unique", "values": "normal", "lead": 0}
    wide = small | {"index_dtype": torch.int64}
    across = {"rows": 2, "vocabulary": tile + pack, "k": 40, "lead": pack - 1, "pad": pack + 1, "edges": True}
    targets = ("global_mean_detached", "local_mean", 0.5)
    return {
        "no-rows": small | {"rows": 0, "vocabulary": 9, "k": 3},  # no launch
        "one-entry": small | {"rows": 3, "vocabulary": 1, "k": 1, "pad": 0},
        # rows shorter than 16 bytes, that begin and end anywhere in them
        "within-a-pack": wide | {"rows": 9, "vocabulary": max(pack - 1, 1), "k": 1, "lead": pack - 1, "pad": 1},
        # one tile that is full
        "whole-tile": small | {"rows": 2, "vocabulary": tile, "k": 9, "pad": 0, "edges": True},
        # a tile begun before the row, candidates at both sides of a tile's end, a gap after each row
        "tile-edges": wide | across,
        # a row as long as a tile, begun within 16 bytes: its last elements are a second tile
        "tile-unaligned": wide | {"rows": 1, "vocabulary": tile, "k": 9, "lead": 1, "pad": 0},
        # a row longer than 1024 threads times 4 packs: the loop over packs runs twice
        "second-stream": small | {"rows": 1, "vocabulary": 1024 * 4 * pack + 5, "k": 7, "lead": 1, "pad": 0},
        # K = 5 * 1024: the most that stays in registers; the tile's loop over K runs three times
        "kept-index": small | {"rows": 1, "vocabulary": 6007, "k": 5120, "pad": 3},
        "reread-index": wide | {"rows": 1, "vocabulary": 6007, "k": 5121, "pad": 0},  # K = 5 * 1024 + 1: read again
        # entries that occur more than once, of which many in a warp: summed by the warp that owns them
        "repeats": small | {"rows": 2, "vocabulary": 37, "k": 600, "kind": "any", "pad": 1},
        # every candidate the same entry
        "one-value": wide | {"rows": 1, "vocabulary": 300, "k": 2100, "kind": "one value", "pad": 0},
        **{f"target-{t}": small | {"target": t, "rows": 3, "vocabulary": 300, "k": 40} for t in targets},
    }


def linear_topk_mse(dtype: torch.dtype) -> Cases:
    """Return a case for each path of the kernels."""
    pack = 16 // dtype.itemsize
    plain = {"target": "global_mean", "bias": True, "wanted": (True, True, True), "lead": 0, "pad": 0}
    small = plain | {"index_dtype": torch.int32, "kind": "any"}
    wide = small | {"index_dtype": torch.int64}
    backward = {"wanted": (True, False, False), "only": True}
    cases = {
        "no-rows": small | {"rows": 0, "vocabulary": 9, "size": 8, "k": 3},  # no launch
        "no-columns": wide | {"rows": 2, "vocabulary": 9, "size": 0, "k": 3},  # hidden of no columns
        # 16 bytes an access; a second block for the bias; a second slice of K, not full
        "packed": small | {"rows": 3, "vocabulary": 260, "size": 8 * pack, "k": 33},
        # 16 bytes an access, rows of weight and its gradient apart; no bias; fewer candidates than warps of a block
        "packed-apart": wide | {"rows": 2, "vocabulary": 31, "size": 2 * pack, "k": 3, "pad": pack, "bias": False},
        # an element an access: the rows have no multiple of 16 bytes
        "single": small | {"rows": 3, "vocabulary": 31, "size": 2 * pack + 1, "k": 40},
        # an element an access: the weight begins within 16 bytes; entries that no row has
        "single-unaligned": wide
        | {"rows": 2, "vocabulary": 300, "size": 2 * pack, "k": 7, "lead": 1, "target": "global_mean_detached"},
        # 8 loads in flight and a rest; a second block of columns for the gradient of hidden, not full
        "unrolled": small | {"rows": 2, "vocabulary": 12, "size": (256 + 40) * pack, "k": 9},
        # the same, an element an access
        "unrolled-single": wide | {"rows": 1, "vocabulary": 12, "size": 256 + 41, "k": 9},
        # more candidates than threads of a block: their loops run twice; ten slices of K
        "long-k": wide | {"rows": 1, "vocabulary": 31, "size": pack, "k": 300, "target": "local_mean"},
        # so many rows that a block sums two chunks of 32 candidates, the second of one
        "several-chunks": small | {"rows": 1024, "vocabulary": 40, "size": pack, "k": 33} | backward,
    }
    for number, target in enumerate(("global_mean_detached", "local_mean", 0.5, "global_mean")):
        wanted = [number != 0, number != 1, number != 2]  # a gradient of the three is not asked for
        sizes = {"rows": 3, "vocabulary": 20, "size": pack, "k": 5, "target": target, "wanted": wanted}
        cases[f"target-{target}"] = small | sizes
    return cases


def linear_topk_unlikelihood(dtype: torch.dtype) -> Cases:
    """Return a case for each path of the kernel that makes losses of the gathered logits."""
    size = 2 * 16 // dtype.itemsize
    plain = {"size": size, "bias": True, "wanted": (True, True, True), "lead": 0, "pad": 0}
    small = plain | {"index_dtype": torch.int32, "kind": "any"}
    wide = plain | {"index_dtype": torch.int64, "kind": "any"}
    return {
        "no-rows": small | {"rows": 0, "vocabulary": 9, "k": 3},  # no launch
        "one-candidate": wide | {"rows": 5, "vocabulary": 31, "k": 2, "kind": "unique"},
        "any": small | {"rows": 3, "vocabulary": 20, "k": 60},  # the true token and others more than once
        # no candidate but the true token
        "alone": wide | {"rows": 2, "vocabulary": 9, "k": 40, "kind": "one value"},
        "long-k": small | {"rows": 2, "vocabulary": 700, "k": 600},  # more candidates than threads of a block
    }


def softmax_loss(dtype: torch.dtype, rows_read: int) -> Cases:
    """Return a case for each path of a kernel that reads so many rows of logits for each row it writes."""
    pack = 16 // dtype.itemsize
    block = 64 * 1024 // dtype.itemsize // rows_read  # elements that a block of a cluster is for
    plain: dict[str, Any] = {"lead": 0, "pad": 0, "values": "normal", "infinite": 0.0}
    short = {"rows": 2, "vocabulary": 99}
    return {
        "no-rows": plain | {"rows": 0, "vocabulary": 9},  # no launch
        "one-entry": plain | {"rows": 3, "vocabulary": 1},
        # rows shorter than 16 bytes, that begin and end anywhere in them, a gap after each row
        "within-a-pack": plain | {"rows": 9, "vocabulary": max(pack - 1, 1), "lead": pack - 1, "pad": pack + 1},
        "aligned": plain | {"rows": 2, "vocabulary": 64 * pack, "together": True},  # whole packs only
        # packs cut at both ends of a row, a gap after it; the reference elsewhere in its packs
        "apart": plain | {"rows": 3, "vocabulary": 40 * pack + 1, "lead": 1, "pad": pack, "together": False},
        # the largest exponent
        **{v.replace(" ", "-"): plain | short | {"values": v} for v in ("extreme", "equal", "one high")},
        "minus-infinity": plain | {"rows": 3, "vocabulary": 300, "infinite": 0.3},
        "one-block": plain | {"rows": 1, "vocabulary": block},  # as much of a row as one block takes
        # a cluster of as many, with rows at any place of a pack
        **{f"{n}-blocks": plain | {"rows": 2, "vocabulary": n // 2 * block + 1, "lead": 3} for n in (2, 4, 8)},
        # a device without room for so many: two blocks take the row
        "few-clusters": plain | {"rows": 2, "vocabulary": 4 * block + 1, "lead": 3, "largest_cluster": 2},
        # a row longer than 8 * 512 threads times 4 packs: the loops over packs run twice in a cluster too; larger
        # logits at the end, so that each round raises the maximum
        "second-round": plain | {"rows": 1, "vocabulary": 8 * 512 * 5 * pack + 5, "lead": 1, "values": "rising"},
    }


def adamw(dtype: torch.dtype) -> Cases:
    """Return a case for each path of the kernel."""
    pack = 16 // dtype.itemsize
    return {
        "nothing": {"size": 0, "lead": 0},  # no launch
        "packed": {"size": 300 * pack, "lead": 0, "clip": True},  # a second block, not full
        "odd-size": {"size": 2 * pack + 1, "lead": 0},  # an element an access
        "unaligned": {"size": 300, "lead": 1, "clip": False},  # the same; a second block, not full
        "decay": {"size": pack, "lead": 0, "decay": 0.1},
    }
