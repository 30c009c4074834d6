"""PALU: make a language model forget chosen answers with the smallest intervention that works.

Method: arXiv 2601.03190. Names are imported on first use, so that `import palu` is instant.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from palu.version import __version__

if TYPE_CHECKING:
    from palu import data as data
    from palu import eager as eager
    from palu import evaluate as evaluate
    from palu import losses as losses
    from palu import ops as ops
    from palu.attacks.run import audit as audit
    from palu.config import UnlearnConfig as UnlearnConfig
    from palu.data.files import DataError as DataError
    from palu.losses import PaluLoss as PaluLoss
    from palu.losses import palu_loss as palu_loss
    from palu.ops import linear_topk_mse as linear_topk_mse
    from palu.ops import linear_topk_unlikelihood as linear_topk_unlikelihood
    from palu.ops import prefix_mask as prefix_mask
    from palu.ops import topk_mse as topk_mse
    from palu.ops import topk_unlikelihood as topk_unlikelihood
    from palu.ref_model.storage import CacheError as CacheError
    from palu.report.recorder import Recorder as Recorder
    from palu.report.write import save_run as save_run
    from palu.report.write import write_card as write_card
    from palu.report.write import write_report as write_report
    from palu.spans.annotate import annotate as annotate
    from palu.training.checkpoint import CheckpointError as CheckpointError
    from palu.training.loop import DivergenceError as DivergenceError
    from palu.training.loop import UnlearnResult as UnlearnResult
    from palu.training.loop import unlearn as unlearn
    from palu.training.trainer import PaluTrainer as PaluTrainer

_NAMES = {
    "palu.attacks.run": ("audit",),
    "palu.config": ("UnlearnConfig",),
    "palu.data.files": ("DataError",),
    "palu.losses": ("PaluLoss", "palu_loss"),
    "palu.ops": ("linear_topk_mse", "linear_topk_unlikelihood", "prefix_mask", "topk_mse", "topk_unlikelihood"),
    "palu.ref_model.storage": ("CacheError",),
    "palu.report.recorder": ("Recorder",),
    "palu.report.write": ("save_run", "write_card", "write_report"),
    "palu.spans.annotate": ("annotate",),
    "palu.training.checkpoint": ("CheckpointError",),
    "palu.training.loop": ("DivergenceError", "UnlearnResult", "unlearn"),
    "palu.training.trainer": ("PaluTrainer",),
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}
_SUBMODULES = ("data", "eager", "evaluate", "losses", "ops")

__all__ = ["__version__", *_MODULE_OF, *_SUBMODULES]


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
