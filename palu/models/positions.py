"""Models with a table of positions, which have none for longer texts."""

from __future__ import annotations

from torch import nn

from palu.models.lora import CausalLM, base_of


def max_positions(model: CausalLM) -> int | None:
    """Return how many positions a model has in its table (GPT-2, OPT, GPT-J); None: it computes any (Llama)."""
    base = base_of(model)
    stated = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    if stated is None:
        return None
    words = base.get_input_embeddings()
    rows = [module.num_embeddings for module in base.modules() if isinstance(module, nn.Embedding) and module != words]
    rows += [len(buffer) for buffer in base.buffers() if buffer.ndim == 2]  # sines that are looked up
    # OPT's table has two rows more.
    return stated if any(stated <= count <= stated + 2 for count in rows) else None


def fit_max_length(max_length: int, *models: CausalLM | None) -> int:
    """Return the longest length up to ``max_length`` for which all of the models have positions."""
    limits = [limit for model in models if model is not None and (limit := max_positions(model)) is not None]
    return min([max_length, *limits])
