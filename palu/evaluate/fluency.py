"""Fluency: a gibberish classifier's verdict on generations."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from tqdm.auto import tqdm

LABEL = "clean"
_BATCH = 32


class FluencyClassifier:
    """A sequence classifier and its tokenizer.

    Args:
        source: a name or path, a text-classification pipeline, or a loaded model that knows where it came from.
        label: the verdict that counts as fluent, in any case.
        device: where a model loaded here is put.

    Raises:
        ValueError: the classifier has no such label; a loaded model whose tokenizer is not known.
    """

    def __init__(self, source: Any, label: str, device: torch.device):
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        if isinstance(source, str | os.PathLike):
            self.model = AutoModelForSequenceClassification.from_pretrained(source).to(device)
            self.tokenizer = AutoTokenizer.from_pretrained(source)
        elif hasattr(source, "model") and getattr(source, "tokenizer", None) is not None:
            self.model, self.tokenizer = source.model, source.tokenizer
        else:
            if not getattr(source, "name_or_path", ""):
                raise ValueError(
                    f"fluency_model is a {type(source).__name__} without a tokenizer; "
                    "give a name, a path or a text-classification pipeline"
                )
            self.model, self.tokenizer = source, AutoTokenizer.from_pretrained(source.name_or_path)
        self.labels = self.model.config.id2label
        self.label = label.casefold()
        if self.label not in (name.casefold() for name in self.labels.values()):
            raise ValueError(
                f"the fluency classifier has no label {label!r}; "
                f"give fluency_label as one of {', '.join(self.labels.values())}"
            )

    @torch.no_grad()
    def __call__(self, texts: Sequence[str], *, bar: tqdm) -> list[dict[str, Any]]:
        """Classify texts: {label, score} each, the score 1 where the label is the fluent one. An empty text is not."""
        verdicts: list[dict[str, Any]] = [{"label": None, "score": 0.0} for _ in texts]
        order = sorted((i for i, text in enumerate(texts) if text.strip()), key=lambda i: len(texts[i]))
        paddable = self.tokenizer.pad_token_id is not None and self.model.config.pad_token_id is not None
        size = _BATCH if paddable else 1
        training = self.model.training
        self.model.eval()
        for start in range(0, len(order), size):
            group = order[start : start + size]
            inputs = self.tokenizer(
                [texts[i] for i in group],
                return_tensors="pt",
                padding=paddable,
                truncation=True,
                max_length=min(self.tokenizer.model_max_length, 512),
            ).to(self.model.device)
            for i, found in zip(group, self.model(**inputs).logits.argmax(-1).tolist(), strict=True):
                name = self.labels[found]
                verdicts[i] = {"label": name, "score": float(name.casefold() == self.label)}
        self.model.train(training)
        bar.update(len(texts))
        return verdicts
