"""SHA-256 fingerprints of models and tokenised sets, which tell one run, or one reference, from another."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from palu.data.packing import Item, Items
from palu.hashing import digest
from palu.models.lora import CausalLM, adapter_settings, base_of, original_name
from palu.models.quantized import quantized_state
from palu.ref_model.anchors import ANSWER_TOKENS, AnchorPrompts

# Of a model's configuration: where it came from, and what no pass of palu's reads.
NOT_THE_MODEL = ("_name_or_path", "transformers_version", "use_cache")


@dataclass(frozen=True)
class Fingerprints:
    """Fingerprints of what a run starts from, each taken once, on first use; the models must still be untouched."""

    _model: CausalLM
    _ref_model: CausalLM | None
    _forget: Sequence[Item]
    _retain: Sequence[Item]
    _anchor_prompts: AnchorPrompts | None = None
    _earlier: Sequence[Item] = ()

    @cached_property
    def model(self) -> str:
        """The model to train, its adapter included."""
        return _of_model(self._model, self._weights, adapter_settings(self._model))

    @cached_property
    def ref_model(self) -> str | None:
        """The reference that was passed in."""
        return None if self._ref_model is None else fingerprint_model(self._ref_model)

    @cached_property
    def reference(self) -> str:
        """The reference: the model that was passed in for it, or the model to train without its adapter."""
        if self.ref_model is not None:
            return self.ref_model
        named = {original_name(name): weights for name, weights in self._weights.items()}
        return _of_model(self._model, {name: weights for name, weights in named.items() if name is not None}, [])

    @cached_property
    def forget(self) -> str:
        """The tokenised forget set, with the rows that the method looks at."""
        return digest(Items.of(self._forget).flat())

    @cached_property
    def retain(self) -> str:
        return digest(Items.of(self._retain).flat())

    @cached_property
    def earlier(self) -> str | None:
        """The tokenised rows of earlier requests."""
        return digest(Items.of(self._earlier).flat()) if self._earlier else None

    @cached_property
    def anchor_prompts(self) -> str | None:
        """All that the reference is asked before training, tokenised, and the secrets that are looked for in it.

        That is everyday prompts, the lists of questions that it continues, paraphrases, and where an answer ends.
        """
        asked = self._anchor_prompts
        if asked is None or not (asked.prompts or asked.neighbours):
            return None
        parts = [asked.prompts, sorted(asked.stop_ids), asked.max_length, ANSWER_TOKENS]
        if own := asked.neighbours:
            lists = [start.prompt for start in (*own.starts, *own.paraphrases)]
            parts += [lists, own.given_paraphrases, [*own.secrets, str(own.variants)]]
        return digest(parts)

    @cached_property
    def _weights(self) -> dict[str, str]:
        return _weights_of(self._model)


def fingerprint_model(model: CausalLM) -> str:
    """Hash a model's weights, configuration and active adapters, less where it was loaded from and by which version."""
    return _of_model(model, _weights_of(model), adapter_settings(model))


def _of_model(model: CausalLM, weights: dict[str, str], adapters: list[Any]) -> str:
    config = {name: value for name, value in model.config.to_dict().items() if name not in NOT_THE_MODEL}
    parts = [json.dumps(config, sort_keys=True, default=str), weights]
    return digest([*parts, adapters] if adapters else parts)


def _weights_of(model: CausalLM) -> dict[str, str]:
    """Hash parameters and buffers, by name; tied ones once, quantised ones with what turns them back into numbers."""
    base = base_of(model)
    named = dict([*base.named_parameters(), *base.named_buffers()]) | quantized_state(base)
    return {name: digest(tensor) for name, tensor in named.items()}
