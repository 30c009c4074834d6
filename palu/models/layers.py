"""The layers of a causal language model's body."""

from __future__ import annotations

from typing import Any

from torch import nn


def layers_of(body: Any) -> list[nn.Module]:
    """Return the layers of a body (:func:`palu.models.head.body_of`) in their order; none where they are not found."""
    count = body.config.get_text_config().num_hidden_layers
    lists = [part for part in body.children() if isinstance(part, nn.ModuleList) and len(part) == count]
    return list(lists[0]) if len(lists) == 1 else []
