"""The native ops (C++ and CUDA), for research code: `palu.ops.topk_mse(logits, index)`.

`library.py` loads the extension (prebuilt, or compiled on first use) and registers fakes and autograd, `twins.py` the
plain-torch kernels. Public functions are in `functional.py`; `selftest.py` compares each op with its plain-torch twin
in `palu/eager.py`.
"""

from palu.ops import twins as _twins  # noqa: F401  (registers kernels)
from palu.ops.functional import adamw_ as adamw_
from palu.ops.functional import cross_entropy_ as cross_entropy_
from palu.ops.functional import kl_div_ as kl_div_
from palu.ops.functional import linear_topk_mse as linear_topk_mse
from palu.ops.functional import linear_topk_unlikelihood as linear_topk_unlikelihood
from palu.ops.functional import prefix_mask as prefix_mask
from palu.ops.functional import topk_mse as topk_mse
from palu.ops.functional import topk_unlikelihood as topk_unlikelihood
from palu.ops.functional import weight_mean as weight_mean
from palu.ops.library import extension_path as extension_path
