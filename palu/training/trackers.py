"""Log every step's record to TensorBoard and Weights & Biases, through accelerate's trackers."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import ProjectConfiguration

from palu.config import UnlearnConfig


def tracker_arguments(config: UnlearnConfig) -> dict[str, Any]:
    """Return an ``Accelerator``'s arguments for the trackers of ``config.report_to``.

    Raises ImportError where the package of one is missing: accelerate would leave it out.
    """
    available = [str(tracker) for tracker in get_available_trackers()]
    for name in config.trackers:
        if name not in available:
            raise ImportError(f"report_to = {config.report_to!r} needs {name}, which is not here; pip install {name}")
    project = ProjectConfiguration(logging_dir=config.logging_dir)
    return {"log_with": list(config.trackers), "project_config": project} if config.trackers else {}


@contextmanager
def tracking(accelerator: Accelerator, config: UnlearnConfig) -> Iterator[None]:
    """Open the trackers within the block, for ``accelerator.log``; close them, whatever happened."""
    if config.trackers and accelerator.is_main_process:
        Path(config.logging_dir).mkdir(parents=True, exist_ok=True)
    # TensorBoard takes no mappings.
    settings = {name: json.dumps(v) if isinstance(v, dict) else v for name, v in config.values().items()}
    accelerator.init_trackers(os.environ.get("WANDB_PROJECT", "palu"), settings, {"wandb": {"dir": config.logging_dir}})
    try:
        yield
    finally:
        # Not end_training, which would end the process group, too: it is not ours.
        for tracker in accelerator.trackers:
            tracker.finish()
