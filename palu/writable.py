"""Check, before anything slow begins, that results can be written where the user wants them; write what is private."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path


def check_folders(settings: Mapping[str, str]) -> None:
    """Raise OSError where a folder of UnlearnConfig.folders cannot be made or written to."""
    for field, folder in settings.items():
        check_folder(Path(folder), f"{field} = {folder!r}")


def check_folder(folder: Path, subject: str) -> None:
    """Raise OSError where a folder, which need not exist, cannot be made or written to; ``subject`` names it."""
    # Tried, not asked for: root may write everywhere, and yet not into /proc.
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    if not there.is_dir():
        raise NotADirectoryError(f"{subject}: {there} is a file; give a folder")
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise OSError(f"{subject}: nothing can be written to {there} ({error.strerror}); give another folder") from None


def check_file(path: Path, subject: str) -> None:
    """Raise OSError where a file, which need not exist, cannot be written; ``subject`` names it."""
    if path.is_dir():
        raise IsADirectoryError(f"{subject} is a folder; give a file")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{subject}: there is no folder {path.parent}")
    if not path.exists():
        return check_folder(path.parent, subject)
    try:
        with open(path, "ab"):
            pass
    except OSError as error:
        raise OSError(f"{subject} cannot be written ({error.strerror}); give another file") from None
    if path.is_file():
        check_folder(path.parent, subject)  # where write_private puts the new one


def private_folder(folder: Path) -> Path:
    """Create a folder that its owner alone can enter; one that is there keeps its mode."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def write_private(path: Path, text: str) -> None:
    """Write a file that its owner alone can read, complete or not at all; a link or device is written to as it is."""
    if path.is_symlink() or (path.exists() and not path.is_file()):  # such as /dev/stdout, which must not be replaced
        path.write_text(text, encoding="utf-8")
        return
    partial = path.with_name(f"{path.name}.partial")
    partial.unlink(missing_ok=True)
    partial.touch(mode=0o600)
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
