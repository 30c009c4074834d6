"""Cases of scale_: blocks of 512 threads with 4 packs each, over the whole tensor."""

from collections.abc import Iterator

import torch
from compare import acc_dtype
from machine import Case, Output, Phase, Placed

from cases.draw import DTYPES, Draw, Fixed, short


def fixed(dtype: torch.dtype) -> Iterator[Fixed]:
    """Yield a case for each path of the kernel."""
    pack = 16 // dtype.itemsize
    block = 512 * 4 * pack  # elements
    half = {"factor": 0.5, "factor_dtype": torch.float32, "lead": 0}
    double = half | {"factor_dtype": torch.float64}
    yield Fixed("nothing", "no launch", half | {"n": 0})
    yield Fixed("one-element", "a pack cut at both ends", double | {"n": 1, "lead": pack - 1})
    yield Fixed("factor-one", "the kernel leaves at once", half | {"n": 1000, "factor": 1.0})
    yield Fixed(
        "almost-one", "a float64 that is 1 as a float32", double | {"n": 1000, "factor": 1 + 2**-30, "lead": pack - 1}
    )
    yield Fixed("whole-block", "packs of one block, none cut", half | {"n": block})
    yield Fixed("second-block", "a block for the last elements", double | {"n": block, "lead": 1})
    if dtype == torch.float64:  # the dtype whose tensor is the smallest
        yield Fixed("whole-grid", "more than 1024 blocks take in one step", half | {"n": 1024 * block + 5, "lead": 1})


def make(
    draw: Draw,
    *,
    n: int | None = None,
    dtype: torch.dtype | None = None,
    factor: float | None = None,
    factor_dtype: torch.dtype | None = None,
    lead: int | None = None,
) -> Case:
    """Make a case of a tensor [n] and a factor."""
    n = int(draw.one(0, 1, 2, 7, 8, 9, 1000, 16383, 16384, 16385, 100_003)) if n is None else n
    dtype = dtype or draw.one(*DTYPES)
    factor = float(draw.one(1.0, 0.0, 0.5, -1.3, 1 + 2**-30, 1e6)) if factor is None else factor
    values = torch.randn(n).to(dtype)
    tensor = Placed("tensor", values, lead=draw.one(0, 1, 3, 7) if lead is None else lead)
    by = Placed("factor", torch.tensor(factor, dtype=factor_dtype or draw.one(torch.float32, torch.float64)))
    truth = values.double() * by.view.double().to(acc_dtype(dtype)).double()
    twin = values.clone().mul_(by.view)
    call = {"dtype": DTYPES.index(dtype), "factor64": by.element == 8, "tensor": tensor, "factor": by, "n": n}
    text = f"{short(dtype)} [{n}] {tensor.place()} by {factor} {short(by.view.dtype)}"
    return Case(text, [tensor, by], [Phase("scale_", call, ["tensor"])], [Output(tensor, truth, twin)])
