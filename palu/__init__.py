"""PALU: make a language model forget chosen answers with the smallest intervention that works.

Method: arXiv 2601.03190. Names are imported on first use, so that `import palu` is instant.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from palu.version import __version__

if TYPE_CHECKING:
    from palu import data, eager, evaluate, losses, ops
    from palu.attacks.run import audit
    from palu.config import UnlearnConfig
    from palu.data.files import DataError
    from palu.losses import PaluLoss, palu_loss
    from palu.ops import linear_topk_mse, linear_topk_unlikelihood, prefix_mask, topk_mse, topk_unlikelihood
    from palu.ref_model.storage import CacheError
    from palu.report.recorder import Recorder
    from palu.report.render import write_card, write_report
    from palu.report.save import save_run
    from palu.spans.annotate import annotate
    from palu.training.checkpoint import CheckpointError
    from palu.training.loop import DivergenceError, UnlearnResult, unlearn
    from palu.training.trainer import PaluTrainer

_MODULE_OF = {
    "CacheError": "palu.ref_model.storage",
    "CheckpointError": "palu.training.checkpoint",
    "DataError": "palu.data.files",
    "DivergenceError": "palu.training.loop",
    "PaluLoss": "palu.losses",
    "PaluTrainer": "palu.training.trainer",
    "Recorder": "palu.report.recorder",
    "UnlearnConfig": "palu.config",
    "UnlearnResult": "palu.training.loop",
    "annotate": "palu.spans.annotate",
    "audit": "palu.attacks.run",
    "linear_topk_mse": "palu.ops",
    "linear_topk_unlikelihood": "palu.ops",
    "palu_loss": "palu.losses",
    "prefix_mask": "palu.ops",
    "save_run": "palu.report.save",
    "topk_mse": "palu.ops",
    "topk_unlikelihood": "palu.ops",
    "unlearn": "palu.training.loop",
    "write_card": "palu.report.render",
    "write_report": "palu.report.render",
}
_SUBMODULES = ("data", "eager", "evaluate", "losses", "ops")

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
    "__version__",
    "annotate",
    "audit",
    "data",
    "eager",
    "evaluate",
    "linear_topk_mse",
    "linear_topk_unlikelihood",
    "losses",
    "ops",
    "palu_loss",
    "prefix_mask",
    "save_run",
    "topk_mse",
    "topk_unlikelihood",
    "unlearn",
    "write_card",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return import_module(f"palu.{name}")
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'palu' has no attribute {name!r}")
    value = getattr(import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(globals().keys() | _MODULE_OF.keys() | set(_SUBMODULES))
