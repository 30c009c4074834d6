"""What lies where in a run's folder: ``model/`` may be published as it is, ``private/`` must not leave the house.

The records hold the forgotten text, figures by row, and hashes from which a short secret could be guessed.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

MODEL, PRIVATE = "model", "private"
HISTORY, SUMMARY, RECORD, CARD = "history.jsonl", "summary.json", "record.json", "README.md"


class RunFolders(NamedTuple):
    """The parts of a run's folder; an earlier palu wrote both into the folder itself."""

    model: Path
    private: Path


def folders_of(run_dir: str | os.PathLike[str]) -> RunFolders:
    """Find the parts of a folder that a run has written."""
    run = Path(run_dir)
    return RunFolders(run / MODEL, run / PRIVATE) if (run / PRIVATE).is_dir() else RunFolders(run, run)


def make_private(run_dir: str | os.PathLike[str]) -> Path:
    """Create ``private/`` in a run's folder, for its owner alone to enter; one that is there keeps its mode."""
    folder = Path(run_dir) / PRIVATE
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def results_folder(model: str | os.PathLike[str]) -> Path:
    """Return where evaluations of a model's folder belong: beside the records of its run, if it has any."""
    folder = Path(model)
    private = folder.absolute().parent / PRIVATE
    return folder.parent / PRIVATE if folder.absolute().name == MODEL and private.is_dir() else folder
