"""SIGTERM, by which clusters and service managers end a process: it ends as after Ctrl-C, with its own exit status."""

from __future__ import annotations

import signal
from types import FrameType
from typing import NoReturn

TERMINATED = 128 + signal.SIGTERM  # 143, the exit status that a shell reports for a process that SIGTERM ended


def exit_on_sigterm(number: int, frame: FrameType | None) -> NoReturn:
    """Handle SIGTERM as Python handles SIGINT: by an exception, so that what is open is closed."""
    raise SystemExit(TERMINATED)
