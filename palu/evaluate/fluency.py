"""Fluency: a gibberish classifier's verdict on generations."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch

LABEL = "clean"
_BATCH = 32


class FluencyClassifier:
    """A text-classification pipeline.

    Args:
        source: a name, a path, or such a pipeline.
        label: the verdict that counts as fluent, in any case.
        device: where a model loaded here is put.

    Raises:
        ValueError: the classifier has no such label; a source that is none of these.
    """

    def __init__(self, source: Any, label: str, device: torch.device):
        from transformers import TextClassificationPipeline, pipeline

        if isinstance(source, str | os.PathLike):
            source = pipeline("text-classification", model=os.fspath(source), device=device)
        elif not isinstance(source, TextClassificationPipeline):
            raise ValueError(
                f"fluency_model is a {type(source).__name__}; give a name, a path or a text-classification pipeline"
            )
        self.pipeline, self.label = source, label.casefold()
        labels = self.pipeline.model.config.id2label.values()
        if self.label not in map(str.casefold, labels):
            raise ValueError(
                f"the fluency classifier has no label {label!r}; give fluency_label as one of {', '.join(labels)}"
            )

    def __call__(self, texts: Sequence[str]) -> list[dict[str, Any]]:
        """Classify texts: {label, score} each, the score 1 where the label is the fluent one. An empty text is not."""
        verdicts: list[dict[str, Any]] = [{"label": None, "score": 0.0} for _ in texts]
        order = sorted((i for i, text in enumerate(texts) if text.strip()), key=lambda i: len(texts[i]))
        tokenizer, config = self.pipeline.tokenizer, self.pipeline.model.config
        paddable = tokenizer.pad_token_id is not None and config.pad_token_id is not None
        settings = {"batch_size": _BATCH if paddable else 1, "max_length": min(tokenizer.model_max_length, 512)}
        found = self.pipeline([texts[i] for i in order], truncation=True, **settings) if order else []
        for i, verdict in zip(order, found, strict=True):
            verdicts[i] = {"label": verdict["label"], "score": float(verdict["label"].casefold() == self.label)}
        return verdicts
