"""What lies where in a run's folder: ``model/`` may be published as it is, ``private/`` must not leave the house.

The records hold the forgotten text, figures by row, and hashes from which a short secret could be guessed.

A run marks its folder as its own (``private/run.json``), and holds a lock on it while it writes.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from palu.version import __version__
from palu.writable import private_folder, write_private

if TYPE_CHECKING:
    from filelock import FileLock

MODEL, PRIVATE = "model", "private"
HISTORY, SUMMARY, RECORD, CARD = "history.jsonl", "summary.json", "record.json", "README.md"
AUDIT, CHECKPOINTS, LOGS = "audit", "checkpoints", "logs"  # folders in private/
QUESTIONS = "evaluation-questions.json"  # an evaluation on one's own questions
FORGET, LEDGER = "forget.jsonl", "ledger.json"  # of all requests so far: their rows, and when each was met
MARK, LOCK = "run.json", "run.lock"

# Patterns of all files that palu writes into a run's folder, but for the mark and the lock.
_HEX, _STEP = "[0-9a-f]" * 16, "[0-9]" * 8
_CHECKPOINTS = (
    *(f"step-{_STEP}.safetensors", f"unfinished/step-{_STEP}.safetensors"),
    *(f"reference-{_HEX}.{end}" for end in ("safetensors", "*.partial", "*.lock")),
)
CHECKPOINT_FILES = tuple(f"{PRIVATE}/{CHECKPOINTS}/{name}" for name in _CHECKPOINTS)
MODEL_FILES = (
    *("config.json", "generation_config.json", "adapter_config.json", "adapter_model.safetensors", CARD),
    *("model.safetensors", "model-[0-9]*-of-[0-9]*.safetensors", "model.safetensors.index.json"),
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "additional_chat_templates/*.jinja"),
)
_PRIVATE_FILES = (
    *(HISTORY, SUMMARY, RECORD, FORGET, LEDGER, "report.html", "report-redacted.html"),
    *("evaluation*.json", "evaluation*.json.gz"),
    *(f"{path}{end}" for path in ("audit.json", f"{AUDIT}/*-{_HEX}.json") for end in ("", ".partial")),
    *(f"{LOGS}/**/events.out.tfevents.*", f"{LOGS}/**/hparams.yml", f"{LOGS}/wandb/**/*"),
)
_FILES = (*CHECKPOINT_FILES, *(f"{MODEL}/{n}" for n in MODEL_FILES), *(f"{PRIVATE}/{n}" for n in _PRIVATE_FILES))


def mark_of(run_dir: str | os.PathLike[str]) -> dict[str, str | int]:
    """Read the mark of the run that wrote to this folder last; it is empty where none has."""
    try:
        mark = json.loads((Path(run_dir) / PRIVATE / MARK).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return mark if isinstance(mark, dict) and "palu" in mark else {}


def _lock(run_dir: str | os.PathLike[str], subject: str) -> FileLock:
    from filelock import FileLock, Timeout

    lock = FileLock(private_folder(Path(run_dir) / PRIVATE) / LOCK, timeout=0, is_singleton=True)
    try:
        lock.acquire()
    except Timeout:
        mark = mark_of(run_dir)
        process = ", ".join(f"{name} {mark.get(name)}" for name in ("pid", "host", "since"))
        raise ValueError(
            f"{subject}: a run is writing to it ({process}); wait for its end, or give another folder"
        ) from None
    return lock


@contextmanager
def hold_run(run_dir: str | os.PathLike[str], subject: str) -> Iterator[None]:
    """Mark a folder as a run's, and hold its lock within the block; a process that dies gives the lock up.

    Blocks of one process may be nested. Raises ValueError where another process holds the lock; ``subject`` names the
    folder.
    """
    lock = _lock(run_dir, subject)
    try:
        if lock.lock_counter == 1:
            since = datetime.now().astimezone().isoformat(timespec="seconds")
            mark = {"palu": __version__, "pid": os.getpid(), "host": platform.node(), "since": since}
            write_private(Path(run_dir) / PRIVATE / MARK, json.dumps(mark) + "\n")
        yield
    finally:
        lock.release()


def check_finished(run_dir: str | os.PathLike[str]) -> None:
    """Raise ValueError where a folder is no run's, or its run has not finished."""
    run = Path(run_dir)
    if not mark_of(run):
        own = mark_of(run.parent) and run.name == MODEL
        fix = f"give the run's folder, {run.parent}" if own else "give the folder that palu unlearn wrote"
        raise ValueError(f"{run} is not the folder of a run; {fix}")
    _lock(run, str(run)).release()
    if not (run / PRIVATE / SUMMARY).exists():
        raise ValueError(f"the run in {run} has not finished; go on with it by palu unlearn ... --resume")


def check_free(run_dir: str | os.PathLike[str], *, overwrite: bool, subject: str, fix: str) -> None:
    """Raise ValueError where a run in this folder would replace another one without ``overwrite``, or what is no run's.

    In the message ``subject`` names the folder, and ``fix`` how to set ``overwrite``.
    """
    run = Path(run_dir)
    if run.exists() and not run.is_dir():
        raise ValueError(f"{subject} is a file; give a folder")
    if mark_of(run):
        _lock(run, subject).release()
        if not overwrite and (run / PRIVATE / SUMMARY).exists():
            raise ValueError(f"{subject} holds a run that has finished; give another folder, or {fix} to replace it")
    elif others := set(files_of_run(run)) - set(files_of_run(run, CHECKPOINT_FILES)):
        name = min(others).relative_to(run)
        raise ValueError(
            f"{subject} holds {name}, but no {PRIVATE}/{MARK} of a run; give another folder, or move it away"
        )


def files_of_run(run_dir: str | os.PathLike[str], patterns: Iterable[str] = _FILES) -> list[Path]:
    """List the files in a folder by whose names palu writes."""
    found = {path for pattern in patterns for path in Path(run_dir).glob(pattern)}
    return sorted(path for path in found if path.is_file() or path.is_symlink())


def delete_files(run_dir: str | os.PathLike[str], files: Iterable[Path]) -> None:
    """Delete files of a run, and the folders that this leaves empty."""
    run = Path(run_dir)
    for file in files:
        file.unlink(missing_ok=True)  # it may lie behind a link that is gone
        with suppress(OSError):  # a folder is not empty
            for folder in file.parents[: len(file.relative_to(run).parts) - 1]:
                folder.rmdir()


def clear_run(run_dir: str | os.PathLike[str], *, keep: Iterable[str] = ()) -> None:
    """Delete what an earlier run, its audits, evaluations and reports have left, and print it; all else stays.

    ``keep``: folders that may lie in ``private/``.
    """
    kept = [Path(folder).resolve() for folder in keep]
    files = [f for f in files_of_run(run_dir) if not any(f.resolve().is_relative_to(folder) for folder in kept)]
    delete_files(run_dir, files)
    names = ", ".join(os.fspath(file.relative_to(run_dir)) for file in files)
    if names:
        print(f"palu: deleted of the earlier run in {run_dir}: {names}", file=sys.stderr)
