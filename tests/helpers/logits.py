"""How many rows of logits a computation holds at once."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class WatchLogits(TorchDispatchMode):
    """Within the block, watch every tensor that is made, views too, and whose last dimension is the vocabulary's.

    ``rows``: the most rows that one of them had; a head [d, V] that is turned round is none.
    """

    def __init__(self, vocab_size: int, hidden_size: int):
        super().__init__()
        self.vocab_size, self.head = vocab_size, (hidden_size, vocab_size)
        self.rows = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, tuple | list) else (found,):
            shape = tensor.shape if isinstance(tensor, torch.Tensor) else ()
            if shape[-1:] == (self.vocab_size,) and shape != self.head:
                self.rows = max(self.rows, tensor.numel() // self.vocab_size)
        return found
