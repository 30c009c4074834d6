"""Say which files of a finished run are published, and where one of its secrets stands in them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

from palu.data.matching import find
from palu.layout import CARD, MODEL, PRIVATE, check_finished
from palu.report.manifest import files_in, hash_files
from palu.report.reading import asked_questions, marked_texts, read_audit, read_run
from palu.report.write import write_card

# Vocabularies have words of every kind in them, and names of weights have numbers.
_UNREAD = (
    *("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json"),
    *("*.safetensors", "*.safetensors.index.json"),
)


class Place(NamedTuple):
    """Where a secret stands: the text's name, its line from 1, and the row (or file) that marks the secret."""

    name: str
    line: int
    row: str


def files_to_publish(run_dir: str | os.PathLike[str], *, changed: bool = False) -> dict[str, Path]:
    """List the files in a finished run's ``model/`` by their names there; a model card that is missing is written.

    ``changed``: whether other files than the run has left there may be among them.

    Raises FileNotFoundError where there is no such folder; ValueError where the folder is no run's, the run has not
    finished, or a link leads out of ``model/``, and without ``changed`` where a file is new, changed or gone since the
    run, the card aside.
    """
    run, model = Path(run_dir), Path(run_dir) / MODEL
    check_finished(run)
    record, _, _ = read_run(run / PRIVATE)
    if not model.is_dir():
        raise FileNotFoundError(f"there is no folder {model}; restore it, or run again")
    inside = run.resolve() / MODEL
    for path in (model, *sorted(model.rglob("*"))):
        if not path.resolve().is_relative_to(inside):
            raise ValueError(f"{path} is a link to {path.resolve()}; put what it leads to in its place, or delete it")
    if not (model / CARD).exists():  # the run was killed at its very end
        write_card(run)
    files = files_in(model)
    saved, now = record["hashes"]["files"], hash_files(model)
    others = dict.fromkeys(saved.keys() - now.keys(), "gone")
    others |= {name: "changed" if name in saved else "new" for name, own in now.items() if own != saved.get(name)}
    if others and not changed:
        listed = ", ".join(f"{name} ({how})" for name, how in sorted(others.items()))
        raise ValueError(f"{model} is not as the run left it: {listed}; undo that, or give --changed to send it so")
    return files


def text_of(path: Path) -> str | None:
    """Read a file of a model in which a secret is looked for; None: a vocabulary, weights, or no text."""
    if any(fnmatch(path.name, pattern) for pattern in _UNREAD):
        return None
    with open(path, "rb") as file:
        if b"\0" in file.read(2**16):
            return None
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None


def secrets_in(run_dir: str | os.PathLike[str], texts: Mapping[str, str]) -> list[Place]:
    """Look for the secrets of a run, its audit and its evaluations in texts by name, as whole words in any case."""
    private = Path(run_dir) / PRIVATE
    marked = marked_texts(read_run(private)[0], read_audit(private), asked_questions(private))
    places = (
        Place(name, text.count("\n", 0, start) + 1, row)
        for name, text in texts.items()
        for secret, row in marked.items()
        for start, _ in find(secret, text, whole=True)
    )
    return list(dict.fromkeys(places))
