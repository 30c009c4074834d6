"""What a run leaves in its folder, beside the model and its tokenizer.

::

    history.jsonl     a record of each optimisation step
    summary.json      counts, outcome, versions, configuration; written last: where it is, the run has finished
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from palu.unlearn import UnlearnResult

HISTORY, SUMMARY = "history.jsonl", "summary.json"


def write_records(
    output: Path, result: UnlearnResult, tokenizer: PreTrainedTokenizerBase, extra: Mapping[str, Any] | None = None
) -> None:
    """Write model, tokenizer, history and summary to a folder; ``extra`` is added to the summary.

    Of a ``PeftModel`` the adapter alone is written. Raises OSError where the folder cannot be written.
    """
    output.mkdir(parents=True, exist_ok=True)
    result.model.save_pretrained(str(output))
    tokenizer.save_pretrained(output)
    with open(output / HISTORY, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in result.history)
    summary = json.dumps({**result.summary, **(extra or {})}, indent=2)
    (output / SUMMARY).write_text(summary + "\n", encoding="utf-8")
