"""The cases of every op. A new op has a module here, with `fixed` and `make`, and a line in OPS."""

import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from machine import Case

from cases import linear_topk_mse, out_of_range, prefix_mask, scale, softmax_loss, topk_mse
from cases.draw import DTYPES, Draw, Fixed, short


@dataclass(frozen=True)
class Op:
    """What makes the cases of an op."""

    make: Callable[..., Case]  # of a Draw and, by name, of the dtype and the sizes that are not to be drawn
    fixed: Callable[[torch.dtype], Iterable[Fixed]]
    dtypes: tuple[torch.dtype, ...] = DTYPES


OPS = {
    "prefix_mask": Op(prefix_mask.make, prefix_mask.fixed, dtypes=()),
    "topk_mse": Op(topk_mse.make, topk_mse.fixed),
    "linear_topk_mse": Op(linear_topk_mse.make, linear_topk_mse.fixed),
    "cross_entropy_": Op(softmax_loss.cross_entropy, partial(softmax_loss.fixed, rows_read=1)),
    "unlikelihood_": Op(softmax_loss.unlikelihood, softmax_loss.fixed_with_others),
    "kl_div_": Op(softmax_loss.kl_div, partial(softmax_loss.fixed, rows_read=2)),
    "kl_div_reverse": Op(softmax_loss.kl_div_reverse, partial(softmax_loss.fixed, rows_read=2)),
    "scale_": Op(scale.make, scale.fixed),
    "out_of_range": Op(out_of_range.make, out_of_range.fixed, dtypes=(torch.float32,)),
}


def fixed_names(op: str) -> Iterator[str]:
    """Yield the names of an op's fixed cases, "op/case/dtype", or "op/case" where no dtype is to be chosen."""
    for dtype in OPS[op].dtypes or (None,):
        for case in OPS[op].fixed(dtype or torch.int64):
            yield f"{op}/{case.name}" + (f"/{short(dtype)}" if dtype else "")


def random_names(op: str, count: int, seed: int) -> Iterator[str]:
    """Yield the names of random cases, "op/seed"."""
    for number in range(count):
        yield f"{op}/{seed + number}"


def seed_of(name: str) -> int:
    """Return the seed of a case: a random one's is in its name, a fixed one's made from it."""
    _, case, *_ = name.split("/")
    return int(case) if case.isdecimal() else zlib.crc32(name.encode())


def make(name: str) -> Case:
    """Make the case of this name."""
    op, case, *dtype = name.split("/")
    draw = Draw(seed_of(name))
    if case.isdecimal():
        return OPS[op].make(draw)
    of = getattr(torch, dtype[0]) if dtype else None
    sizes = next(fixed.sizes for fixed in OPS[op].fixed(of or torch.int64) if fixed.name == case)
    return OPS[op].make(draw, **sizes, **({"dtype": of} if of else {}))


def check_name(name: str) -> None:
    """Raise ValueError, with what would do, unless a case has this name."""
    op, _, case = name.partition("/")
    if op not in OPS:
        raise ValueError(f"no op is called {op!r}; there are {', '.join(OPS)}")
    if not case.isdecimal() and name not in fixed_names(op):
        raise ValueError(f"{name!r} is no case: use {op}/SEED, or one of\n  " + "\n  ".join(fixed_names(op)))
