"""Launches of the kernels: the arguments of a case placed in guarded memory, and the launchers' structs."""

from dataclasses import replace
from typing import Any

import torch
from helpers import adamw_cases, op_cases
from helpers.op_cases import DTYPES, Draw, OpCase
from machine import Case, Output, Phase, Placed

from palu.eager import acc_dtype


def layout(draw: Draw, columns: int, lead: int | None, pad: int | None) -> dict[str, Any]:
    """Return `lead` and `stride` of a tensor whose rows are `pad` apart: aligned, anywhere, or apart."""
    lead = draw.one(0, 0, 1, 3, 5, 7) if lead is None else lead
    return {"lead": lead, "stride": columns + (draw.one(0, 0, 0, 1, 3, 8, 16) if pad is None else pad)}


def of_case(case: OpCase, places: dict[str, Placed | None], phases: list[Phase], text: str) -> Case:
    """Make a case of its placed tensors; the outputs are among them."""
    expected = {name: of for name, of in case.expected().items() if places.get(name) is not None}
    outputs = [Output(places[name], *of) for name, of in expected.items()]  # type: ignore[arg-type]
    return Case(f"{case.text}, {text}", [p for p in places.values() if p is not None], phases, outputs)


def prefix_mask(draw: Draw, *, place: str | None = None, **sizes: Any) -> Case:
    """Launch it on labels whose rows are apart, transposed, in steps, or one row expanded."""
    case = op_cases.prefix_mask(draw, **sizes)
    labels, n, eos = case.inputs["labels"], case.inputs["n"], case.inputs["eos_token_id"]
    batch, length = labels.shape
    place = place or draw.one("rows", "rows", "transposed", "steps", "expanded")
    if place == "expanded":
        labels.copy_(labels[:1].clone().expand(batch, length))
        placed = Placed("labels", labels[:1].clone())
        strides = 0, 1
    elif place == "transposed":
        placed = Placed("labels", labels.t().clone(), stride=batch + draw.one(0, 3))
        strides = 1, placed.stride
    elif place == "steps":
        step = draw.one(2, 3)
        spread = torch.full((batch, length * step), 1)
        spread[:, ::step] = labels
        placed = Placed("labels", spread, stride=length * step + draw.one(0, 5))
        strides = placed.stride, step
    else:
        placed = Placed("labels", labels, stride=length + draw.one(0, 1, 5))
        strides = placed.stride, 1
    mask = Placed("mask", None, (batch, length), torch.bool)
    numbers = {"batch": batch, "length": length, "n": n, "eos": -1 if eos is None else eos}
    numbers |= {"batch_stride": strides[0], "token_stride": strides[1]}
    return of_case(case, {"labels": placed, "mask": mask}, [Phase("prefix_mask", numbers, ["mask"], ["mask"])], place)


def _center(target: str | float) -> dict[str, Any]:
    if not isinstance(target, str):
        return {"center": 2, "constant": float(target)}
    return {"center": int(target == "local_mean"), "constant": 0.0}


def topk_mse(draw: Draw, *, lead: int | None = None, pad: int | None = None, edges: bool = False, **sizes: Any) -> Case:
    """Launch both passes on logits and a gradient whose rows are `pad` apart.

    `edges`: candidates at both sides of a tile's end. K and the vocabulary must be larger than 4.
    """
    case = op_cases.topk(draw, "topk_mse", **sizes)
    z, at, incoming, target = (case.inputs[name] for name in ("logits", "index", "grad", "target"))
    (rows, vocabulary), k, acc = z.shape, at.shape[1], acc_dtype(z.dtype)
    gradient = Placed("grad_logits", None, (rows, vocabulary), z.dtype, **layout(draw, vocabulary, lead, pad))
    if edges:
        _put_at_edges(at, gradient)
    logits = Placed("logits", z, **layout(draw, vocabulary, lead, pad))
    places: dict[str, Placed | None] = {
        "logits": logits,
        "index": Placed("index", at),
        "grad": Placed("grad", incoming),
        "loss": Placed("loss", None, (rows,), acc),
        "slope": Placed("slope", None, (rows, k), acc),
        "grad_logits": gradient,
    }
    numbers: dict[str, Any] = {"dtype": DTYPES.index(z.dtype), "index64": at.dtype == torch.int64, "rows": rows}
    numbers |= {"vocab_size": vocabulary, "k": k, "through_mean": target == "global_mean"} | _center(target)
    phases = [
        Phase("topk_mse", numbers, ["loss", "slope"], ["loss", "slope", "grad_logits"]),
        Phase("topk_backward", numbers, ["grad_logits"], ["grad_logits"]),
    ]
    return of_case(case, places, phases, f"logits {logits.place()}, gradient {gradient.place()}")


def _put_at_edges(index: torch.Tensor, gradient: Placed) -> None:
    """Put the last candidates of each row at its beginning, and at both sides of the first tile's end or the row's."""
    tile = 56 * 1024 // gradient.element
    for r in range(gradient.rows):
        before = (gradient.pointer // gradient.element + r * gradient.stride) % (16 // gradient.element)
        end = min(tile - before, gradient.columns - 1)
        row = index[r]
        for column, place in ((-1, end), (-2, end - 1), (-3, 0), (-4, 1)):
            row[row == place] = row[column]  # each once
            row[column] = place


def linear_topk(
    draw: Draw, *, op: str, lead: int | None = None, pad: int | None = None, only: bool = False, **sizes: Any
) -> Case:
    """Launch linear_topk_mse or linear_topk_unlikelihood, and the gradients that are asked for.

    `lead` and `pad` are those of weight, and `pad` that of its gradient. `only`: the gradients alone, with the slope
    given.
    """
    case = op_cases.linear_topk(draw, op, **sizes)
    a, dtype, acc = case.inputs, case.dtype, acc_dtype(case.dtype)
    (rows, size), (vocabulary, _), k = a["hidden"].shape, a["weight"].shape, a["index"].shape[1]
    target = a.get("target")
    of_hidden, of_weight, of_bias = (a[f"grad_{name}"] is not None for name in ("hidden", "weight", "bias"))
    setting: dict[str, Any] = {"floor": a["floor"]} if target is None else _center(target)
    through, is_global = target == "global_mean", setting.get("center") == 0
    apart = draw.one(0, 0, 0, 1, 8, 16) if pad is None else pad
    leads = {"weight": draw.one(0, 0, 0, 1, 8) if lead is None else lead}
    leads["hidden"] = draw.one(0, 0, 0, 1) if pad is None else 0
    strides = {"weight": size + apart, "grad_hidden": size + draw.one(0, 0, 3)}
    strides["grad_weight"] = size + (draw.one(0, 0, 3, 8) if pad is None else pad)
    slices = min(-(-1024 // rows), -(-k // 32)) if rows else 1  # as in linear_topk_backward.cu
    places: dict[str, Placed | None] = {
        name: None if t is None else Placed(name, t, lead=leads.get(name, 0), stride=strides.get(name))
        for name, t in a.items()
        if name not in ("target", "floor")
    }
    given = {
        "slope": case.expected()["slope"][0].to(acc) if only else None,
        "weight_mean": a["weight"].mean(0, dtype=acc) if is_global else None,
        "bias_mean": a["bias"].mean(0, dtype=acc).reshape(1) if is_global and a["bias"] is not None else None,
    }
    if of_weight or of_bias:
        given["sorted_index"], given["sorted_order"] = torch.sort(a["index"].flatten(), stable=True)
    places |= {name: None if t is None else Placed(name, t) for name, t in given.items()}
    scratch = {
        "loss": ((rows,), acc, not only),
        "slope": ((rows, k), acc, not only),
        "grad_through_mean": ((rows,), acc, through),
        "partial": ((slices * rows, size), acc, of_hidden),
        "offsets": ((vocabulary + 1,), torch.int64, of_weight or of_bias),
        "common_row": ((size,), acc, through and of_weight),
    }
    places |= {name: Placed(name, None, shape, of) for name, (shape, of, is_there) in scratch.items() if is_there}
    numbers: dict[str, Any] = {"dtype": DTYPES.index(dtype), "index64": a["index"].dtype == torch.int64, "rows": rows}
    numbers |= {"vocab_size": vocabulary, "hidden_size": size, "k": k} | setting
    phases = [] if only else [Phase(op, numbers, ["loss", "slope"], ["loss", "slope"])]
    if through:
        phases.append(Phase("linear_grad_through_mean", numbers, ["grad_through_mean"], ["grad_through_mean"]))
    if of_hidden:
        phases.append(Phase("linear_grad_hidden", numbers, ["partial", "grad_hidden"], ["partial"]))
    if of_weight or of_bias:
        written = ["offsets", "common_row", "grad_weight", "grad_bias"]
        phases.append(Phase("linear_grad_weight", numbers, written, ["offsets", "common_row"]))
    made = of_case(case, places, phases, f"weight +{leads['weight']} stride {strides['weight']}")
    made.outputs = [o for o in made.outputs if not only or o.placed.name != "slope"]
    return made


def softmax_loss(
    draw: Draw,
    *,
    op: str,
    lead: int | None = None,
    pad: int | None = None,
    together: bool | None = None,
    largest_cluster: int = 8,
    **sizes: Any,
) -> Case:
    """Launch cross_entropy_ or kl_div_.

    `together`: the reference's rows begin at the same place of a 16-byte pack. `largest_cluster`: how many blocks of a
    cluster the device has room for.
    """
    case = op_cases.softmax_loss(draw, op, **sizes)
    z = case.inputs["logits"]
    rows, vocabulary = z.shape
    logits = Placed("logits", z, **layout(draw, vocabulary, lead, pad))
    places: dict[str, Placed | None] = {
        "logits": logits,
        "row_weight": Placed("row_weight", case.inputs["row_weight"]),
        "loss": Placed("loss", None, (rows,), acc_dtype(z.dtype)),
    }
    numbers = {"dtype": DTYPES.index(z.dtype), "rows": rows, "vocab_size": vocabulary}
    numbers["reverse"] = case.inputs.get("reverse", False)
    text = f"logits {logits.place()}"
    if op == "cross_entropy_":
        places["labels"] = Placed("labels", case.inputs["labels"])
    else:
        together = draw.chance(0.5) if together is None else together
        at = logits.pointer % 16 // logits.element
        apart = layout(draw, vocabulary, (at + 1) % (16 // logits.element), None)
        ref_layout: dict[str, Any] = {"lead": at, "stride": logits.stride} if together else apart
        ref = Placed("ref_logits", case.inputs["ref_logits"], **ref_layout)
        places["ref_logits"] = ref
        text += f", ref {ref.place()}"
    made = of_case(case, places, [Phase(op, numbers, ["logits", "loss"], ["loss"])], text)
    made.largest_cluster = largest_cluster
    return made


class Joined:
    """The float32 weights that bfloat16 ones and their lower bits make, as an output."""

    name = "weight"

    def __init__(self, weight: Placed, low_bits: Placed):
        self._parts = weight, low_bits

    @property
    def view(self) -> torch.Tensor:
        """What they are now."""
        return adamw_cases.join(*(part.view for part in self._parts))


def adamw(draw: Draw, *, lead: int | None = None, **sizes: Any) -> Case:
    """Launch a step of AdamW on weights that begin `lead` elements past a 16-byte boundary."""
    case = adamw_cases.adamw(draw, **sizes)
    weight, low_bits = adamw_cases.split(case.inputs["start"], case.dtype)
    lead = draw.one(0, 0, 1, 3) if lead is None else lead
    given = {"weight": weight, "low_bits": low_bits}
    given |= {name: case.inputs[name] for name in ("grad", "exp_avg", "exp_avg_sq", "clip_factor")}
    places = {name: None if t is None else Placed(name, t, lead=lead * (name == "weight")) for name, t in given.items()}
    step, rate, decay, beta1, beta2, eps = (case.inputs[name] for name in adamw_cases.NUMBERS)
    unbias = (1 - beta2**step) ** 0.5
    numbers = {"dtype": DTYPES.index(case.dtype), "size": weight.numel(), "decay_factor": 1 - rate * decay}
    numbers |= {
        "step_size": rate * unbias / (1 - beta1**step),
        "one_minus_beta1": 1 - beta1,
        "one_minus_beta2": 1 - beta2,
        "eps": eps * unbias,
    }
    written = ["weight", "low_bits", "exp_avg", "exp_avg_sq"]
    made = of_case(case, places, [Phase("adamw_", numbers, written)], f"weight +{lead}")
    if low_bits is not None:
        whole: Any = Joined(places["weight"], places["low_bits"])  # type: ignore[arg-type]
        made.outputs = [replace(o, placed=whole) if o.placed.name == "weight" else o for o in made.outputs]
    return made
