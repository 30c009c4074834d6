"""Read and watch the memory of this process."""

from __future__ import annotations

import re
import threading
import time
from pathlib import Path

import torch


def status(name: str) -> int:
    """Read a figure of /proc/self/status (Linux), in bytes: "VmRSS", "RssAnon" (no file stands behind it), ..."""
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


class PeakMemory:
    """Within the block, seconds and highest anonymous memory of each stage, in MiB above that at the beginning.

    The memory is read a thousand times a second.
    """

    def __init__(self, stage: str):
        self.seconds: dict[str, float] = {}
        self.mib: dict[str, float] = {}
        self.stage = stage

    def __enter__(self) -> PeakMemory:
        self.before, self.since = status("RssAnon"), time.perf_counter()
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()
        self.begin("")

    def begin(self, stage: str) -> None:
        """End the stage, and begin another."""
        self._read()
        self.seconds[self.stage] = time.perf_counter() - self.since
        self.stage, self.since = stage, time.perf_counter()

    def _watch(self) -> None:
        while not self.ended.wait(0.001):
            self._read()

    def _read(self) -> None:
        stage, now = self.stage, (status("RssAnon") - self.before) / 2**20
        self.mib[stage] = max(self.mib.get(stage, 0.0), now)

    def row(self, *stages: str, seconds: bool = False) -> dict[str, float]:
        """Return a table's figures of these stages."""
        found: dict[str, float] = {}
        for stage in stages:
            found |= {f"{stage}_s": round(self.seconds[stage], 1)} if seconds else {}
            found |= {f"{stage}_mib": round(self.mib[stage], 1)}
        return found
