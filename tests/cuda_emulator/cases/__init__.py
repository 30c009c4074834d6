"""The cases of every op: fixed.py has those of a certain path, launches.py what makes a case of its sizes.

The arguments, and what must come of them, are those of tests/helpers/op_cases.py.
"""

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from helpers.op_cases import DTYPES, Draw
from machine import Case

from cases import fixed, launches, out_of_range
from cases.fixed import Cases

LARGE = 0.6  # of the random vocabularies are as large as a model's


@dataclass(frozen=True)
class Op:
    """What makes the cases of an op."""

    make: Callable[..., Case]  # of a Draw and, by name, of the dtype and the sizes that are not to be drawn
    fixed: Callable[[torch.dtype], Cases]
    dtypes: tuple[torch.dtype, ...] = DTYPES


_OF_KL = partial(fixed.softmax_loss, rows_read=2)
OPS = {
    "prefix_mask": Op(launches.prefix_mask, fixed.prefix_mask, dtypes=()),
    "topk_mse": Op(launches.topk_mse, fixed.topk_mse),
    "linear_topk_mse": Op(partial(launches.linear_topk, op="linear_topk_mse"), fixed.linear_topk_mse),
    "linear_topk_unlikelihood": Op(
        partial(launches.linear_topk, op="linear_topk_unlikelihood"), fixed.linear_topk_unlikelihood
    ),
    "cross_entropy_": Op(partial(launches.softmax_loss, op="cross_entropy_"), partial(fixed.softmax_loss, rows_read=1)),
    "kl_div_": Op(partial(launches.softmax_loss, op="kl_div_", reverse=False), _OF_KL),
    "kl_div_reverse": Op(partial(launches.softmax_loss, op="kl_div_", reverse=True), _OF_KL),
    "adamw_": Op(launches.adamw, fixed.adamw, dtypes=(torch.float32, torch.bfloat16)),
    "out_of_range": Op(out_of_range.make, out_of_range.fixed, dtypes=(torch.float32,)),
}


def fixed_names(op: str) -> Iterator[str]:
    """Yield the names of an op's fixed cases, "op/case/dtype", or "op/case" where no dtype is to be chosen."""
    for dtype in OPS[op].dtypes or (None,):
        for case in OPS[op].fixed(dtype or torch.int64):
            yield f"{op}/{case}" + (f"/{dtype}".replace("torch.", "") if dtype else "")


def seed_of(name: str) -> int:
    """Return the seed of a case: a random one's is in its name, a fixed one's made from it."""
    _, case, *_ = name.split("/")
    return int(case) if case.isdecimal() else zlib.crc32(name.encode())


def make(name: str) -> Case:
    """Make the case of this name."""
    op, case, *dtype = name.split("/")
    draw = Draw(seed_of(name), large=LARGE)
    if case.isdecimal():
        return OPS[op].make(draw)
    of = getattr(torch, dtype[0]) if dtype else None
    return OPS[op].make(draw, **OPS[op].fixed(of or torch.int64)[case], **({"dtype": of} if of else {}))
