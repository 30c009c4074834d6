"""Run a long benchmark in stages: a finished stage is a file, and a later run goes on where the last one stopped."""

from __future__ import annotations

import argparse
import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


class Stages:
    """The finished stages of a benchmark, as files in a folder; ``key``: the settings on which they depend.

    Raises SystemExit where the folder holds the stages of other settings.
    """

    def __init__(self, folder: Path, key: dict[str, Any]):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        known = folder / "settings.json"
        settings = json.dumps(key, indent=1, sort_keys=True) + "\n"
        if known.exists() and known.read_text() != settings:
            raise SystemExit(f"{folder} holds the stages of other settings ({known}); give another --output")
        known.write_text(settings)

    def path(self, name: str, make: Callable[[Path], None]) -> Path:
        """Return the file or folder of a stage; ``make(path)`` writes it where it is missing."""
        path = self.folder / name
        if not path.exists():
            make(path)
        return path

    def results(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the result of a stage, kept as JSON; ``make()`` computes it where it is missing."""

        def write(path: Path) -> None:
            partial = path.with_suffix(".partial")
            with gzip.open(partial, "wt", encoding="utf-8") as file:
                json.dump(make(), file)
            os.replace(partial, path)

        with gzip.open(self.path(f"{name}.json.gz", write), "rt", encoding="utf-8") as file:
            return json.load(file)


def stages_parser(description: str, output: str, data: str, file: str) -> argparse.ArgumentParser:
    """Make a parser with the options of a command whose stages are kept: --data, --model, --output, --results.

    data: the data set's folder in ../shared, the default; file: one that any such folder has.
    """

    def folder(given: str) -> Path:
        if not (Path(given) / file).exists():
            raise argparse.ArgumentTypeError(f"{given} holds no {file}; give the data set's folder")
        return Path(given)

    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=folder, default=str(DATA / data), help=f"the data set's folder, with {file}")
    parser.add_argument("--model", default="smollm2", help="smollm2, or a name or path")
    parser.add_argument("--output", type=Path, default=Path("runs") / output, help="folder of the finished stages")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    return parser
