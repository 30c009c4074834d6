"""What lies where in a run's folder: ``model/`` may be published as it is, ``private/`` must not leave the house.

The records hold the forgotten text, figures by row, and hashes from which a short secret could be guessed.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

MODEL, PRIVATE = "model", "private"
HISTORY, SUMMARY, RECORD, CARD = "history.jsonl", "summary.json", "record.json", "README.md"
AUDIT, CHECKPOINTS, LOGS = "audit", "checkpoints", "logs"  # folders in private/
QUESTIONS = "evaluation-questions.json"  # an evaluation on one's own questions


class RunFolders(NamedTuple):
    """The parts of a run's folder; an earlier palu wrote both into the folder itself."""

    model: Path
    private: Path


def folders_of(run_dir: str | os.PathLike[str]) -> RunFolders:
    """Find the parts of a folder that a run has written."""
    run = Path(run_dir)
    return RunFolders(run / MODEL, run / PRIVATE) if (run / PRIVATE).is_dir() else RunFolders(run, run)


def check_free(run_dir: str | os.PathLike[str], *, overwrite: bool, told: str, mend: str) -> None:
    """Raise ValueError where a run that is written to this folder would replace an earlier one, or another model.

    ``overwrite``: whether it may. ``told`` names the folder in the message, ``mend`` how to set ``overwrite``.
    """
    run = Path(run_dir)
    if run.exists() and not run.is_dir():
        raise ValueError(f"{told} is a file; give a folder")
    if overwrite:
        return
    if has_finished(run):
        raise ValueError(f"{told} holds a run that has finished; give another folder, or {mend} to replace it")
    # Beside private/, a model is of a run that has not finished.
    if not (run / PRIVATE).is_dir() and any(holds_model(folder) for folder in (run, run / MODEL)):
        raise ValueError(f"{told} holds a model that is no run's; give another folder, or {mend} to write there")


def has_finished(run_dir: Path) -> bool:
    """Whether a folder holds a run that has finished; an earlier palu wrote its summary into the folder itself."""
    return any((folder / SUMMARY).exists() for folder in (run_dir / PRIVATE, run_dir))


def holds_model(folder: Path) -> bool:
    """Whether this is the folder of a model, or of an adapter."""
    return any((folder / file).exists() for file in ("config.json", "adapter_config.json"))


def clear_run(run_dir: str | os.PathLike[str], *, keep: Iterable[str] = ()) -> None:
    """Delete a finished run with its audits, evaluations and reports, so that none passes for a new run's.

    Of a model that is no run's, the files in ``model/`` alone. ``keep``: folders that may lie in ``private/``.
    """
    run = Path(run_dir)
    # An earlier palu wrote everything into the folder itself.
    records = [folder for folder in (run / PRIVATE, run) if (folder / SUMMARY).exists()]
    kept = [Path(folder).resolve() for folder in keep]
    for path in [path for folder in (*records, run / MODEL) for path in folder.glob("*")]:
        if path.is_file():
            path.unlink()
    for path in [folder / name for folder in records for name in (AUDIT, CHECKPOINTS, LOGS)]:
        if not any(one.is_relative_to(path.resolve()) for one in kept):
            shutil.rmtree(path, ignore_errors=True)


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
