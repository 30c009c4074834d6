"""Check labels in a way that torch.compile traces and that no GPU is waited for."""

import torch
from torch import Tensor


@torch.library.custom_op("palu::checked_labels", mutates_args=())
def checked_labels(labels: Tensor, vocab_size: int, sentinels: list[int]) -> Tensor:
    """Return a copy of labels [B, T] int64, each of which is a token id in [0, `vocab_size`) or one of the sentinels.

    Raises:
        ValueError: another label; on CUDA it is a device-side assertion.
    """
    good = (labels >= 0) & (labels < vocab_size)
    for sentinel in sentinels:
        good |= labels == sentinel
    known = f"a token id below V = {vocab_size}, {' or '.join(map(str, sentinels))}"
    if labels.device.type == "cuda":
        torch._assert_async(good.all(), f"palu_loss: each label must be {known}")
    elif len(bad := (~good).nonzero()):
        row, token = bad[0].tolist()
        raise ValueError(f"palu_loss: labels[{row}, {token}] = {int(labels[row, token])}: a label must be {known}")
    return labels.clone()  # used, so that no compiler drops the check


@checked_labels.register_fake
def _(labels: Tensor, vocab_size: int, sentinels: list[int]) -> Tensor:
    return torch.empty_like(labels)
