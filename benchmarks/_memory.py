"""Read and watch the memory of this process, on Linux."""

from __future__ import annotations

import re
import threading
from pathlib import Path


def status(name: str) -> int:
    """Read a figure of /proc/self/status, in bytes: "VmRSS", "VmHWM", "RssAnon" (no file stands behind it), ..."""
    found = re.search(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])


class PeakMemory:
    """The highest anonymous memory of this process within the block, in MiB above that at its beginning."""

    def __enter__(self) -> PeakMemory:
        self.before = self.highest = status("RssAnon")
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()
        self.highest = max(self.highest, status("RssAnon"))

    def watch(self) -> None:
        """Look at the memory a hundred times a second."""
        while not self.ended.wait(0.01):
            self.highest = max(self.highest, status("RssAnon"))

    @property
    def peak_mib(self) -> float:
        """The highest memory above that at the beginning."""
        return round((self.highest - self.before) / 2**20, 1)
