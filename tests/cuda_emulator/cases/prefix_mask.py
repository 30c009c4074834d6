"""Cases of prefix_mask: a warp for each row, 32 labels a step, 8 steps a load, 4 rows a block."""

from collections.abc import Iterator

import torch
from machine import Case, Output, Phase, Placed

from cases.draw import Draw, Fixed
from palu import eager


def fixed(_: torch.dtype) -> Iterator[Fixed]:
    """Yield a case for each path of the kernel."""
    plain = {"batch": 5, "n": 3, "gaps": 0.1, "layout": "rows"}
    yield Fixed("no-rows", "no launch", plain | {"batch": 0, "length": 9})
    yield Fixed("no-columns", "no launch", plain | {"length": 0})
    yield Fixed("one-label", "31 lanes past the row; a block with one row of four", plain | {"length": 1})
    yield Fixed("whole-step", "a step without a lane past the row", plain | {"length": 32})
    yield Fixed("past-a-step", "a second step with one label", plain | {"length": 33})
    yield Fixed("whole-load", "all 8 steps of a load", plain | {"length": 256})
    yield Fixed("past-a-load", "a second load with one label", plain | {"length": 257})
    long = {"batch": 4, "length": 700, "gaps": 0.0, "layout": "rows", "eos": None}
    yield Fixed("open-span", "a span that is open over steps and loads, and ends in the last", long | {"n": 600})
    yield Fixed("whole-spans", "n = -1", long | {"n": -1, "gaps": 0.005})
    yield Fixed("nothing", "n = 0", long | {"n": 0})
    yield Fixed("largest-n", "n near the end of int64", long | {"n": 2**63 - 1})
    for layout in ("transposed", "steps", "expanded"):
        yield Fixed(layout, "strides of views", {"batch": 6, "length": 70, "n": 3, "gaps": 0.1, "layout": layout})
    yield Fixed("end-of-text", "spans that eos ends", plain | {"length": 100, "eos": 2, "gaps": 0.0})


def make(
    draw: Draw,
    *,
    batch: int | None = None,
    length: int | None = None,
    n: int | None = None,
    gaps: float | None = None,
    layout: str | None = None,
    eos: int | None = -1,  # drawn
) -> Case:
    """Make a case of labels [batch, length] in which a share `gaps` of the labels is not sensitive."""
    batch = int(draw.one(0, 1, 2, 3, 4, 5, 17)) if batch is None else batch
    length = int(draw.one(0, 1, 5, 31, 32, 33, 63, 255, 256, 257, 511, 600, 1025)) if length is None else length
    n = int(draw.one(-1, 0, 1, 3, 31, 32, 33, 256, 300, 2**62, 2**63 - 1)) if n is None else n
    eos = draw.one(None, None, 2, 0, 2**63 - 1) if eos == -1 else eos
    gaps = draw.one(0.0, 0.005, 0.1, 0.5, 1.0) if gaps is None else gaps  # long spans, short ones, none
    layout = layout or draw.one("rows", "rows", "transposed", "steps", "expanded")
    labels = torch.randint(0, 5, (batch, length))
    labels[torch.rand(batch, length) < gaps] = draw.one(-1, -100, -200, -(2**63))
    if labels.numel() and draw.chance(0.3):
        labels.view(-1)[draw.random.randrange(labels.numel())] = 2**63 - 1
    if layout == "expanded":
        labels = labels[:1].expand(batch, length)
        placed = Placed("labels", labels[:1].clone() if batch else labels.clone())
        strides = 0, 1
    elif layout == "transposed":
        placed = Placed("labels", labels.t().clone(), stride=batch + draw.one(0, 3))
        strides = 1, placed.stride
    elif layout == "steps":
        step = draw.one(2, 3)
        spread = torch.full((batch, length * step), 1)
        spread[:, ::step] = labels
        placed = Placed("labels", spread, stride=length * step + draw.one(0, 5))
        strides = placed.stride, step
    else:
        placed = Placed("labels", labels, stride=length + draw.one(0, 1, 5))
        strides = placed.stride, 1
    mask = Placed("mask", None, (batch, length), torch.bool)
    truth = eager.prefix_mask(labels, min(n, 2**40), eos)
    call = {"labels": placed, "batch_stride": strides[0], "token_stride": strides[1], "mask": mask}
    call |= {"batch": batch, "length": length, "n": n, "eos": -1 if eos is None else eos}
    text = f"[{batch}, {length}] {layout}, n {n}, eos {eos}, gaps {gaps}"
    phase = Phase("prefix_mask", call, ["mask"], ["mask"])
    return Case(text, [placed, mask], [phase], [Output(mask, truth, None)])
