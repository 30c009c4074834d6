"""How far a result of an op is off, in rounding units: half an ulp of the result, and an ulp of its sums."""

import math

import torch
from torch import Tensor

from palu.eager import acc_dtype


def compare(got: Tensor, truth: Tensor, twin: Tensor | None, scale: Tensor | None) -> tuple[str, float]:
    """Compare a result with the truth in float64 and with what plain torch makes of it in the same dtypes.

    Returns what is wrong ("" if nothing is), and the error in rounding units. More than 16 units that are more than 4
    times plain torch's are wrong. Booleans and integers must be equal.
    """
    if not got.is_floating_point():
        different = int((got != truth).sum())
        return f"{different} of {got.numel()} differ" if different else "", 0.0
    units = largest_error(got, truth, scale)
    plain = 0.0 if twin is None else largest_error(twin, truth, scale)
    return "" if units <= max(16, 4 * plain) else f"off by {units:.3g} units, plain torch by {plain:.3g}", units


def largest_error(got: Tensor, truth: Tensor, scale: Tensor | None) -> float:
    """Return the largest error, in rounding units.

    A unit is half an ulp of the result in its own dtype, and one of the row's scale in the dtype of its sums.
    Infinite where what must be infinite or NaN is not, or the other way round.
    """
    if not truth.numel():
        return 0.0
    rounded = truth.to(got.dtype)  # what overflows, overflows
    special = ~rounded.isfinite()
    if not torch.equal(_coded(got[special]), _coded(rounded[special])):
        return math.inf
    truth, got = torch.where(special, 0, truth), torch.where(special, 0, got)
    size, info = truth.abs(), torch.finfo(got.dtype)
    largest = size.amax(-1, keepdim=True) if truth.dim() == 2 else size
    if scale is not None:
        largest = torch.maximum(largest, scale.nan_to_num(nan=0.0, posinf=0.0).reshape(largest.shape))
    error = (got.double() - truth).abs()
    unit = size * info.eps / 2 + largest * torch.finfo(acc_dtype(got.dtype)).eps + info.tiny * info.eps / 2
    if error.isnan().any():
        return math.inf
    return float(torch.where(error == 0, 0.0, error / unit).max())


def _coded(special: Tensor) -> Tensor:
    return special.double().nan_to_num(nan=0.5, posinf=1, neginf=-1)
