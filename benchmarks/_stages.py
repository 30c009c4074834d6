"""A long benchmark in pieces: finished stages are files, and a run goes on where the last one stopped."""

from __future__ import annotations

import gzip
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class OutOfTimeError(Exception):
    """The next stage would not fit."""


class Stages:
    """Finished stages, as files in a folder, and the time left for more."""

    def __init__(self, folder: Path, minutes: float | None, key: dict[str, Any]):
        self.folder = folder
        self.deadline = None if minutes is None else time.monotonic() + 60 * minutes
        self.longest = 0.0
        folder.mkdir(parents=True, exist_ok=True)
        known = folder / "settings.json"
        told = json.dumps(key, indent=1, sort_keys=True) + "\n"
        if known.exists() and known.read_text() != told:
            raise SystemExit(f"{folder} holds the stages of other settings ({known}); give another --output")
        known.write_text(told)

    def path(self, name: str, make: Callable[[Path], None]) -> Path:
        """The file or folder of a stage; ``make(path)`` writes it where it is missing."""
        path = self.folder / name
        if not path.exists():
            if self.deadline is not None and time.monotonic() + self.longest > self.deadline:
                raise OutOfTimeError(name)
            started = time.monotonic()
            make(path)
            self.longest = max(self.longest, time.monotonic() - started)
        return path

    def results(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """A stage whose result is JSON."""

        def write(path: Path) -> None:
            partial = path.with_suffix(".partial")
            with gzip.open(partial, "wt", encoding="utf-8") as file:
                json.dump(make(), file)
            os.replace(partial, path)

        with gzip.open(self.path(f"{name}.json.gz", write), "rt", encoding="utf-8") as file:
            return json.load(file)


@contextmanager
def resumable() -> Iterator[None]:
    """End the program with code 3 where no time is left."""
    try:
        yield
    except OutOfTimeError as stage:
        print(f"no time for stage {stage}; run the same command again to go on")
        raise SystemExit(3) from None
