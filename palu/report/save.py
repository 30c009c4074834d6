"""Write a run's folder: the model and its tokenizer, with the run's records beside them.

::

    history.jsonl     a record of each optimisation step
    summary.json      counts, outcome, versions, configuration
    record.json       what the model said before and after (:mod:`palu.report.recorder`)
    report.html       both, to look at; README.md: the model card (:mod:`palu.report`)
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from palu.report.recorder import Recorder
    from palu.training.loop import UnlearnResult

HISTORY, SUMMARY = "history.jsonl", "summary.json"


def save_run(
    output: str | os.PathLike[str],
    result: UnlearnResult,
    tokenizer: PreTrainedTokenizerBase,
    recorder: Recorder,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Write a run's folder: the model, its tokenizer, the records, the model card and the report.

    Of a ``PeftModel`` the adapter alone is written. Of many processes, call it on the main one.

    Args:
        output: the folder.
        result: of :func:`palu.unlearn`.
        tokenizer: the model's.
        recorder: the :class:`palu.Recorder` that looked at the model before the run.
        extra: added to the summary.

    Returns:
        The report's path.

    Raises:
        OSError: the folder cannot be written.
    """
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    result.model.save_pretrained(str(folder))
    tokenizer.save_pretrained(folder)
    with open(folder / HISTORY, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in result.history)
    recorder.save(folder, result.model)
    # Where it is, the run has finished: what comes after can be made again.
    summary = json.dumps({**result.summary, **(extra or {})}, indent=2)
    (folder / SUMMARY).write_text(summary + "\n", encoding="utf-8")
    from palu.report.render import write_card, write_report

    write_card(folder)
    return write_report(folder)
