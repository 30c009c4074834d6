"""PALU: make a language model forget chosen answers with the smallest intervention that works.

Method: arXiv 2601.03190. Names are imported on first use, so that `import palu` is instant.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from palu import evaluate
    from palu.annotate import annotate
    from palu.cache_file import CacheError
    from palu.checkpoint import CheckpointError
    from palu.config import UnlearnConfig
    from palu.data import DataError
    from palu.losses import PaluLoss, palu_loss
    from palu.ops import linear_topk_mse, prefix_mask, topk_mse
    from palu.output import save_run
    from palu.record import Recorder
    from palu.report import write_card, write_report
    from palu.trainer import PaluTrainer
    from palu.unlearn import DivergenceError, UnlearnResult, unlearn

__version__ = "0.1.0"

_HOME = {
    "CacheError": "palu.cache_file",
    "CheckpointError": "palu.checkpoint",
    "DataError": "palu.data",
    "DivergenceError": "palu.unlearn",
    "PaluLoss": "palu.losses",
    "PaluTrainer": "palu.trainer",
    "Recorder": "palu.record",
    "UnlearnConfig": "palu.config",
    "UnlearnResult": "palu.unlearn",
    "annotate": "palu.annotate",
    "linear_topk_mse": "palu.ops",
    "palu_loss": "palu.losses",
    "prefix_mask": "palu.ops",
    "save_run": "palu.output",
    "topk_mse": "palu.ops",
    "unlearn": "palu.unlearn",
    "write_card": "palu.report",
    "write_report": "palu.report",
}

__all__ = [
    "CacheError",
    "CheckpointError",
    "DataError",
    "DivergenceError",
    "PaluLoss",
    "PaluTrainer",
    "Recorder",
    "UnlearnConfig",
    "UnlearnResult",
    "annotate",
    "evaluate",
    "linear_topk_mse",
    "palu_loss",
    "prefix_mask",
    "save_run",
    "topk_mse",
    "unlearn",
    "write_card",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name == "evaluate":
        return import_module("palu.evaluate")
    if name not in _HOME:
        raise AttributeError(f"module 'palu' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(globals().keys() | _HOME.keys() | {"evaluate"})
