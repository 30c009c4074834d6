"""The native ops (C++ and CUDA), for research code: `palu.ops.topk_mse(logits, index)`.

`library.py` loads the extension (prebuilt, or compiled on first use) and registers fakes and autograd, `twins.py` the
plain-torch kernels. Public functions are in `functional.py`; `selftest.py` compares each op with its plain-torch twin
in `palu/eager.py`.
"""

from palu.ops import twins as _twins  # noqa: F401  (registers kernels)
from palu.ops.functional import (
    adamw_,
    cross_entropy_,
    kl_div_,
    linear_topk_mse,
    linear_topk_unlikelihood,
    prefix_mask,
    topk_mse,
    topk_unlikelihood,
    weight_mean,
)
from palu.ops.library import extension_path

__all__ = [
    "adamw_",
    "cross_entropy_",
    "extension_path",
    "kl_div_",
    "linear_topk_mse",
    "linear_topk_unlikelihood",
    "prefix_mask",
    "topk_mse",
    "topk_unlikelihood",
    "weight_mean",
]
