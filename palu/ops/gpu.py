"""How fast a GPU moves bytes and multiplies, by what its driver says of it.

The choice of gather or dense (:func:`palu.ops.functional.use_gather`) and ``benchmarks/gpu_budget.py`` read it.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

# Floating-point operations of a multiprocessor in a clock, a multiplication and an addition being two (CUDA C++
# Programming Guide, and NVIDIA's papers on each architecture): dense products of 16-bit types, and float32.
PER_CLOCK: dict[tuple[int, int], tuple[int, int]] = {
    (7, 0): (1024, 128),
    (7, 5): (1024, 128),
    (8, 0): (2048, 128),
    (8, 6): (1024, 256),
    (9, 0): (4096, 256),
    (10, 0): (8192, 256),
    (12, 0): (1024, 256),
}
HALVES = (torch.bfloat16, torch.float16)


class Gpu(NamedTuple):
    """What of a GPU decides its speed."""

    capability: tuple[int, int]
    processors: int  # multiprocessors
    clock: float  # Hz
    bandwidth: float  # bytes a second, of device memory

    def products(self, dtype: torch.dtype) -> float:
        """Return the floating-point operations a second of a matrix product; float64 counts as half of float32."""
        known = max((one for one in PER_CLOCK if one <= self.capability), default=min(PER_CLOCK))
        halves, singles = PER_CLOCK[known]
        per_clock = halves if dtype in HALVES else singles / (1 + (dtype == torch.float64))
        return self.processors * self.clock * per_clock

    def balance(self, dtype: torch.dtype) -> float:
        """Return for how many rows a product with a head takes as long as reading the head once.

        With fewer rows it is bound by the bytes of the head, V d s, with more by its 2 R V d operations. About 295 in
        bfloat16 on an H100, 153 on an A100 of 80 GB; 37 in float32 on an H100.
        """
        return self.products(dtype) * dtype.itemsize / (2 * self.bandwidth)


H100 = Gpu((9, 0), 132, 1.83e9, 3.35e12)  # SXM, at the clock that its peak of 989e12 is given for
A100 = Gpu((8, 0), 108, 1.41e9, 2.04e12)  # SXM, 80 GB


@lru_cache
def gpu_at(device: torch.device) -> Gpu:
    """Read a device's properties; one whose driver tells no clocks counts as an H100."""
    told = torch.cuda.get_device_properties(device)
    clock, memory, width = told.clock_rate, told.memory_clock_rate, told.memory_bus_width  # kHz, kHz, bits
    if not (clock and memory and width):
        return H100
    bandwidth = 2 * 1e3 * memory * width / 8  # two transfers a clock
    return Gpu((told.major, told.minor), told.multi_processor_count, 1e3 * clock, bandwidth)
