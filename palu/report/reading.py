"""Read the files of a run's folder from which reports are made."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from palu.evaluate.rows import load_results
from palu.report.layout import HISTORY, RECORD, SUMMARY
from palu.report.recorder import FORMAT

Json = dict[str, Any]


class RecordError(ValueError):
    """A folder's records are missing or damaged; the message names the file and the mend."""


def read_run(folder: Path) -> tuple[Json, Json, list[Json]]:
    """Read (record, summary, history) from the folder of a run's records."""
    record = _read(folder / RECORD, "save one with palu.Recorder")
    summary = _read(folder / SUMMARY, "write the run's summary beside its record")
    if record.get("format") != FORMAT:
        raise RecordError(
            f"{folder / RECORD} has format {record.get('format')}, and this palu reads {FORMAT}; "
            "report with the palu that wrote it"
        )
    lines = _text(folder / HISTORY, "write the run's history beside its record").split("\n")
    return record, summary, [_parse(folder / HISTORY, line) for line in lines if line.strip()]


def _read(path: Path, mend: str) -> Json:
    return _parse(path, _text(path, mend))


def _text(path: Path, mend: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecordError(f"{path} is missing, so this is no folder of a recorded run; {mend}") from None
    except UnicodeDecodeError as error:
        raise RecordError(f"{path} is damaged ({error}); restore it, or run again") from error


def _parse(path: Path, text: str) -> Json:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise RecordError(f"{path} is damaged ({error}); restore it, or run again") from error
    if not isinstance(value, dict):
        raise RecordError(f"{path} does not hold what palu wrote; restore it, or run again")
    return value


def evaluations(folder: Path) -> list[Json]:
    """Read the aggregates of each evaluation in the folder: {file, about, values, reasons}, "before" first."""
    found = []
    paths = [*folder.glob("evaluation*.json"), *folder.glob("evaluation*.json.gz")]
    for path in sorted(paths, key=lambda path: ("before" not in path.name, path.name)):
        try:
            results = load_results(path)
        except ValueError as error:
            raise RecordError(f"{path}: {error}") from error
        about = results.get("palu", {})
        entries = {
            name: value for name, value in results.items() if isinstance(value, Mapping) and "agg_value" in value
        }
        found.append(
            {
                "file": path.name,
                "about": " ".join(str(about[key]) for key in ("benchmark", "split") if about.get(key)),
                "values": {name: entry["agg_value"] for name, entry in entries.items()},
                "reasons": {name: entry["reason"] for name, entry in entries.items() if entry.get("reason")},
            }
        )
    return found
