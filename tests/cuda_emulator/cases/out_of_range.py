"""Indices and labels out of range: each must end in a device assertion, with no access out of bounds before it."""

from typing import Any

import torch
from helpers import op_cases
from helpers.op_cases import Draw
from machine import Case

from cases import launches
from cases.fixed import Cases

LAUNCHERS = (
    "topk_mse",
    "topk_backward",
    "linear_topk_mse",
    "linear_topk_unlikelihood",
    "linear_grad_hidden",
    "cross_entropy_",
)


def fixed(_: torch.dtype) -> Cases:
    """Return a case for each assertion."""
    return {
        f"{launcher}-{name}": {"launcher": launcher, "value": value, "drawn": False}
        for launcher in LAUNCHERS
        for name, value in (("below", -1), ("past", None))
    }


def make(
    draw: Draw,
    *,
    dtype: torch.dtype | None = None,
    launcher: str | None = None,
    value: int | None = None,
    drawn: bool = True,
) -> Case:
    """Make a case whose last index or label is `value` (None: the size of the vocabulary)."""
    launcher = launcher or draw.one(*LAUNCHERS)
    if drawn:
        value = draw.one(-1, None, 2**31 - 1, 2**32)
    if launcher == "cross_entropy_":
        case = launches.softmax_loss(draw, op=launcher, dtype=dtype, rows=2, vocabulary=300)
        name, vocabulary = "labels", 300
    elif launcher.startswith("topk"):
        vocabulary = draw.one(5, 300, 40_000) if drawn else 300
        case = launches.topk_mse(draw, dtype=dtype, rows=2, vocabulary=vocabulary, k=draw.one(3, 600))
        name = "index"
    else:
        vocabulary = 9
        op = launcher if launcher in op_cases.SETTING else "linear_topk_mse"
        sizes: dict[str, Any] = {"vocabulary": 9, "size": draw.one(7, 64), "k": 40, "target": "local_mean"}
        case = launches.linear_topk(draw, op=op, dtype=dtype, rows=2, wanted=(True, True, True), **sizes)
        name = "index"
    case.phases = [phase for phase in case.phases if phase.launcher == launcher]
    placed = {p.name: p for p in case.buffers}
    at = placed[name].initial_view
    at.view(-1)[-1] = vocabulary if value is None or value > torch.iinfo(at.dtype).max else value
    if launcher in ("topk_backward", "linear_grad_hidden"):  # the forward pass is left out
        placed["slope"].initial_view.fill_(0.5)
    case.text, case.must_assert = f"{launcher}, the last of {name} is {int(at.view(-1)[-1])}: {case.text}", True
    return case
