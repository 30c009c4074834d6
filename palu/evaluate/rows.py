"""Load the benchmarks' rows and results, from files or by public name."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from palu.data.files import DataError, read_rows

Row: TypeAlias = Mapping[str, Any]
Results: TypeAlias = dict[str, Any]


def load_rows(path: Path) -> list[Any]:
    """Load the rows of a benchmark's .jsonl or .json file; DataError names the file, the line and the fix."""
    return [row for _, row in read_rows(path, path.stem)]


def hub_rows(name: str, config: str, split: str) -> list[dict[str, Any]]:
    """Load the rows of a dataset by its public name, through ``datasets``."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(
            f"loading {name} by name needs datasets ({error}); pip install 'palu-unlearn[evaluate]', or give a folder"
        ) from error
    return [dict(row) for row in load_dataset(name, config, split=split)]


def require(rows: Sequence[Any], name: str, columns: Sequence[str], fix: str) -> None:
    """Raise DataError unless each row has text in every column; ``perturbed_answer`` is a list of texts."""
    for number, row in enumerate(rows):
        where = f"{name} row {number}"
        if not isinstance(row, Mapping):
            raise DataError(f"{where}: a row must map column names to values, got {type(row).__name__}; {fix}")
        for column in columns:
            value = row.get(column)
            texts = value if column == "perturbed_answer" else [value]
            if value is None:
                raise DataError(f"{where}: column '{column}' is missing; {fix}")
            if not isinstance(texts, list | tuple) or not texts:
                raise DataError(f"{where}: column '{column}' must be a list of one or more wrong answers; {fix}")
            if not all(isinstance(text, str) and text.strip() for text in texts):
                raise DataError(f"{where}: column '{column}' holds a blank or something else than text; {fix}")


def load_results(source: str | os.PathLike[str] | Mapping[str, Any]) -> Results:
    """Load results as a dict: given as one, or read from .json or .json.gz.

    Raises ValueError if they are no evaluation's, FileNotFoundError for a missing file.
    """
    if isinstance(source, Mapping):
        results: Any = dict(source)
    else:
        raw = Path(source).read_bytes()
        try:
            results = json.loads(gzip.decompress(raw) if str(source).endswith(".gz") else raw)
        except (ValueError, OSError) as error:
            raise ValueError(f"{source} does not hold results ({error}); give the JSON of an evaluation") from error
    if not isinstance(results, dict) or not any(isinstance(v, Mapping) and "agg_value" in v for v in results.values()):
        raise ValueError(
            "these are no results: a mapping of metrics to {agg_value, value_by_index} is needed, "
            "as palu.evaluate returns it and open-unlearning logs it"
        )
    return results
