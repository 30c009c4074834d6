"""Arguments of `palu/ops/linear_losses.py`: checked, flattened to rows, scaled, and cast as autocast says."""

import math
from collections.abc import Mapping
from numbers import Integral, Real

import torch
from torch import Tensor

from palu.ops.library import check_tensors


def flat_head(
    who: str,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    chunk_bytes: int,
    others: Mapping[str, Tensor],
    prefix: str = "",
) -> tuple[Tensor, Tensor, Tensor | None, torch.Size]:
    """Check the arguments of a head, and that `others` are on the same device.

    Returns:
        hidden [R, d], weight and bias, scaled and in autocast's dtype, and the leading dimensions of `hidden`.
    """
    names = [f"{prefix}{name}" for name in ("hidden", "weight", "bias")]
    given = dict(zip(names, (hidden, weight, bias), strict=True))
    check_tensors(who, **{name: t for name, t in given.items() if t is not None}, **others)
    if hidden.dim() < 2:
        raise ValueError(f"{who}: {names[0]} must have 2 dimensions or more, got shape {list(hidden.shape)}")
    if weight.dim() != 2:
        raise ValueError(f"{who}: {names[1]} must have 2 dimensions, got shape {list(weight.shape)}")
    if hidden.shape[-1] != weight.shape[1]:
        raise ValueError(f"{who}: {names[0]} has {hidden.shape[-1]} columns but {names[1]} has {weight.shape[1]}")
    if bias is not None:
        check_shape(who, names[2], bias, weight.shape[:1])
    if math.prod(hidden.shape[:-1]) and not weight.shape[0]:
        raise ValueError(f"{who}: the vocabulary is empty: {names[1]} has no rows")
    for name, value in ((f"{prefix}scale", scale), (f"{prefix}softcap", 1.0 if softcap is None else softcap)):
        if isinstance(value, bool) or not isinstance(value, Real) or not 0 < value < math.inf:
            raise ValueError(f"{who}: {name} must be a positive number, got {value!r}")
    if isinstance(chunk_bytes, bool) or not isinstance(chunk_bytes, int) or chunk_bytes < 1:
        raise ValueError(f"{who}: chunk_bytes must be a positive integer, got {chunk_bytes!r}")
    h, w, b = hidden.flatten(0, -2), weight, bias
    if scale != 1:  # an integer stays one, and is refused below
        h = h * scale if h.is_floating_point() else h
        b = b * scale if b is not None and b.is_floating_point() else b
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        h, w = _cast(h, dtype), _cast(w, dtype)
        b = _cast(b, dtype) if b is not None else None
    if h.dtype == torch.float16 and kind == "cpu":
        raise TypeError(f"{who}: {names[0]} is float16, which the CPU kernels do not support; use bfloat16 or float32")
    if h.dtype != torch.float64 and h.dtype not in _AUTOCAST:
        raise TypeError(
            f"{who}: {names[0]} must be float32, float64, bfloat16 or (not on a CPU) float16, got {dtype_name(h.dtype)}"
        )
    for name, t in ((names[1], w), (names[2], b)):
        if t is not None and t.dtype != h.dtype:
            raise TypeError(f"{who}: {name} must be {dtype_name(h.dtype)}, got {dtype_name(t.dtype)}")
    return h, w, b, hidden.shape[:-1]


_AUTOCAST = (torch.float32, torch.bfloat16, torch.float16)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """As autocast does: float64 stays."""
    return tensor.to(dtype) if tensor.dtype in _AUTOCAST else tensor


def flat_index(who: str, index: Tensor, rows: torch.Size, weight: Tensor) -> Tensor:
    """Check an index [..., K] and return it as [R, K]."""
    if index.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{who}: index must be int32 or int64, got {dtype_name(index.dtype)}")
    if index.dim() < 2 or index.shape[:-1] != rows:
        raise ValueError(f"{who}: index must have shape {[*rows, 'K']}, got {list(index.shape)}".replace("'", ""))
    if rows.numel() and not index.shape[-1]:
        raise ValueError(f"{who}: needs at least one index per row, got K = 0")
    return index.flatten(0, -2)


def check_labels(who: str, labels: Tensor, rows: torch.Size) -> None:
    if labels.dtype != torch.int64:
        raise TypeError(f"{who}: labels must be int64, got {dtype_name(labels.dtype)}")
    check_shape(who, "labels", labels, rows)


def check_ignore_index(who: str, ignore_index: int, dtype: torch.dtype) -> None:
    """Raise ValueError unless `dtype` holds it: torch compares a tensor with what is left of a larger number."""
    limits = torch.iinfo(dtype)
    is_integer = isinstance(ignore_index, Integral) and not isinstance(ignore_index, bool)
    if not is_integer or not limits.min <= ignore_index <= limits.max:
        raise ValueError(f"{who}: ignore_index must be an integer that {dtype_name(dtype)} holds, got {ignore_index!r}")


def check_shape(who: str, name: str, tensor: Tensor, shape: torch.Size) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{who}: {name} must have shape {list(shape)}, got {list(tensor.shape)}")


def check_choice(who: str, name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{who}: unknown {name} {value!r}; choose one of {', '.join(choices)}")


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def cap(softcap: float | None) -> float | None:
    return None if softcap is None else float(softcap)
