"""SHA-256 fingerprints of models and tokenised sets: what tells one run, or one reference, from another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from palu.adapter import CausalLM, base_of, original_name
from palu.anchors import ANSWER_TOKENS, Everyday
from palu.packing import Item

# Of a model's configuration: where it came from, and what no pass of palu's reads.
NOT_THE_MODEL = ("_name_or_path", "transformers_version", "use_cache")


class Fingerprints:
    """Of what a run starts from. Each is taken when it is first asked for, once; the models must still be untouched."""

    def __init__(
        self,
        model: CausalLM,
        ref_model: CausalLM | None,
        forget: Sequence[Item],
        retain: Sequence[Item],
        everyday: Everyday | None = None,
    ) -> None:
        self._model, self._ref_model, self._forget, self._retain = model, ref_model, forget, retain
        self._everyday = everyday

    @cached_property
    def model(self) -> str:
        """The model to train, its adapter included."""
        return _of_model(self._model, self._weights)

    @cached_property
    def ref_model(self) -> str | None:
        """The reference that was passed in."""
        return None if self._ref_model is None else fingerprint_model(self._ref_model)

    @cached_property
    def reference(self) -> str:
        """The model that is asked: the reference that was passed in, or the model to train without its adapter."""
        if self.ref_model is not None:
            return self.ref_model
        named = {original_name(name): digest for name, digest in self._weights.items()}
        return _of_model(self._model, {name: digest for name, digest in named.items() if name is not None})

    @cached_property
    def forget(self) -> str:
        """The tokenised forget set, with the rows that the objective looks at."""
        return digest(_as_one(self._forget))

    @cached_property
    def retain(self) -> str:
        """The tokenised retain set."""
        return digest(_as_one(self._retain))

    @cached_property
    def everyday(self) -> str | None:
        """The tokenised prompts to which the reference writes anchors, and where an answer ends."""
        if self._everyday is None or not self._everyday.prompts:
            return None
        prompts, stop_ids, max_length = self._everyday
        return digest([prompts, sorted(stop_ids), max_length, ANSWER_TOKENS])

    @cached_property
    def _weights(self) -> dict[str, str]:
        return _weights_of(self._model)


def fingerprint_model(model: CausalLM) -> str:
    """Of a model's weights and of its configuration, less where it was loaded from and by which version."""
    return _of_model(model, _weights_of(model))


def digest(value: Any) -> str:
    """SHA-256, as hexadecimal digits, of nested lists and mappings of tensors, strings and numbers."""
    sha256 = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            sha256.update(f"{value.dtype}{list(value.shape)}".encode())
            sha256.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        elif isinstance(value, Mapping):
            add([part for pair in value.items() for part in pair])
        elif isinstance(value, (list, tuple)):
            sha256.update(f"({len(value)})".encode())
            for part in value:
                add(part)
        else:
            sha256.update(f"{value!r},".encode())

    add(value)
    return sha256.hexdigest()


def _of_model(model: CausalLM, weights: dict[str, str]) -> str:
    config = {name: value for name, value in model.config.to_dict().items() if name not in NOT_THE_MODEL}
    return digest([json.dumps(config, sort_keys=True, default=str), weights])


def _weights_of(model: CausalLM) -> dict[str, str]:
    """Fingerprints of parameters and buffers, by name; of tied ones once."""
    base = base_of(model)
    return {name: digest(tensor) for name, tensor in [*base.named_parameters(), *base.named_buffers()]}


def _as_one(items: Sequence[Item]) -> list[Any]:
    """All items in a few long tensors, which are hashed faster than many short ones."""
    if not items:
        return []
    parts = [(item.input_ids, item.rows, item.labels) for item in items]
    sizes = [(len(item.input_ids), len(item.rows), item.targets, item.lengths) for item in items]
    return [*map(torch.cat, zip(*parts, strict=True)), repr(sizes)]
