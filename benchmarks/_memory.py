"""Read the memory of this process."""

from __future__ import annotations

import re
from pathlib import Path

import torch


def status(name: str) -> int:
    """Read a figure of /proc/self/status (Linux), in bytes: "VmRSS", "VmHWM", ..."""
    found = re.search(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])


def reset_peak() -> None:
    """Begin the count of :func:`peak`."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """Return the highest memory since :func:`reset_peak`, in bytes: torch's on CUDA, else the resident set."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else status("VmHWM")
