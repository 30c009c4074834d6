"""Load TOFU's sets (arXiv 2401.06121), from a folder or by public name."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from palu.data.files import DataError
from palu.evaluate.rows import hub_rows, load_rows, require

NAME = "locuslab/TOFU"
SPLITS = ("forget01", "forget05", "forget10")
# The sets, and how the names of their entries begin.
PREFIX = {"forget": "forget", "retain": "retain", "real_authors": "ra", "world_facts": "wf"}
COLUMNS = {
    "forget": ("question", "answer", "paraphrased_answer", "perturbed_answer"),
    "retain": ("question", "answer", "paraphrased_answer", "perturbed_answer"),
    "real_authors": ("question", "answer", "perturbed_answer"),
    "world_facts": ("question", "answer", "perturbed_answer"),
    "holdout": ("question", "answer"),
}
FIX = "fill it in, or use TOFU's perturbed sets, which have it"


@dataclass(frozen=True)
class TofuData:
    """TOFU's sets, each a list of rows.

    Every row has ``question``, ``answer`` and ``perturbed_answer`` (a list of wrong answers), in ``forget`` and
    ``retain`` also ``paraphrased_answer``. Rows of ``holdout``, which no model has seen, need question and answer only.
    Any set but ``forget`` may be empty; what depends on it is then null.
    """

    forget: list[dict[str, Any]]
    retain: list[dict[str, Any]] = field(default_factory=list)
    real_authors: list[dict[str, Any]] = field(default_factory=list)
    world_facts: list[dict[str, Any]] = field(default_factory=list)
    holdout: list[dict[str, Any]] = field(default_factory=list)


def load_tofu(forget: str = "forget05", data: str | os.PathLike[str] | TofuData | None = None) -> TofuData:
    """Load TOFU's sets for one forget split.

    Args:
        forget: ``"forget01"``, ``"forget05"`` or ``"forget10"``, or another ``forget*.jsonl`` of the folder.
        data: a folder with ``{forget}.jsonl``, ``retain_perturbed.jsonl``, ``real_authors.jsonl``,
            ``world_facts.jsonl`` and perhaps ``holdout*.jsonl`` of the same number; None: ``locuslab/TOFU`` by name.

    Raises:
        ValueError: there is no such split.
        DataError: a row lacks a column, or the forget set is empty.
        FileNotFoundError: a file is missing.
    """
    if isinstance(data, TofuData):
        loaded = data
    elif data is None:
        if forget not in SPLITS:
            raise ValueError(f"there is no forget split {forget!r}; {NAME} has {', '.join(SPLITS)}")
        loaded = TofuData(
            forget=hub_rows(NAME, f"{forget}_perturbed", "train"),
            **{name: hub_rows(NAME, f"{name}_perturbed", "train") for name in PREFIX if name != "forget"},
            holdout=hub_rows(NAME, forget.replace("forget", "holdout"), "train"),
        )
    else:
        folder = Path(data)
        known = sorted(path.stem for path in folder.glob("forget*.jsonl"))
        if not known:
            raise FileNotFoundError(f"{folder} holds no forget*.jsonl; give TOFU's folder, or None to load it by name")
        if forget not in known:
            raise ValueError(f"there is no forget split {forget!r}; {folder} has {', '.join(known)}")
        holdout = folder / f"{forget.replace('forget', 'holdout')}.jsonl"
        loaded = TofuData(
            forget=load_rows(folder / f"{forget}.jsonl"),
            retain=load_rows(folder / "retain_perturbed.jsonl"),
            real_authors=load_rows(folder / "real_authors.jsonl"),
            world_facts=load_rows(folder / "world_facts.jsonl"),
            holdout=load_rows(holdout) if holdout.exists() else [],
        )
    if not loaded.forget:
        raise DataError("forget set is empty; give at least one row")
    for name, columns in COLUMNS.items():
        require(getattr(loaded, name), name, columns, FIX)
    return loaded
