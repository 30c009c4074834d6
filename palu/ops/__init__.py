"""The native ops (C++ and CUDA), for research code: `palu.ops.topk_mse(logits, index)`.

`library.py` loads the extension (prebuilt, or compiled on first use) and registers fakes and autograd. Public functions
are in `functional.py` (the local entropy loss), in `linear_losses.py` (general ones on hidden states and a head; their
ops are in `loss_ops.py` and `topk_ops.py`) and in `fused.py` (those that form the gradient in the forward pass).
`selftest.py` compares each op with its plain-torch twin in `palu/eager.py`.
"""

from palu.ops import batching as _batching  # noqa: F401  (registers rules for vmap)
from palu.ops import twins as _twins  # noqa: F401  (registers kernels)
from palu.ops.functional import linear_topk_mse, prefix_mask, topk_mse, weight_mean
from palu.ops.fused import cross_entropy_, kl_div_, unlikelihood_
from palu.ops.library import extension_path
from palu.ops.linear_losses import (
    linear_cross_entropy,
    linear_kl,
    linear_topk_kl,
    linear_topk_log_probs,
    linear_topk_logits,
)

__all__ = [
    "cross_entropy_",
    "extension_path",
    "kl_div_",
    "linear_cross_entropy",
    "linear_kl",
    "linear_topk_kl",
    "linear_topk_log_probs",
    "linear_topk_logits",
    "linear_topk_mse",
    "prefix_mask",
    "topk_mse",
    "unlikelihood_",
    "weight_mean",
]
