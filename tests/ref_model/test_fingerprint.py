"""Fingerprints of models with adapters: two are the same where the models compute the same, and else they are not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers.tiny import tiny_llama

from palu.ref_model.fingerprint import Fingerprints, fingerprint_model

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's


def lora(**settings: Any) -> peft.PeftModel:
    """A model with an adapter that is not the identity, its weights the same whatever the settings."""
    torch.manual_seed(5)
    config = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "init_lora_weights": False} | settings
    return peft.get_peft_model(tiny_llama(), peft.LoraConfig(**config)).eval()


def two_adapters(active: str) -> peft.PeftModel:
    model = lora()
    model.add_adapter("other", peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    model.set_adapter(active)
    return model


def disabled() -> peft.PeftModel:
    model = lora()
    model.base_model.disable_adapter_layers()
    return model


def scaled() -> peft.PeftModel:
    model = lora()
    model.base_model.model.model.layers[0].self_attn.q_proj.set_scale("default", 3.0)
    return model


def test_what_an_adapter_computes_is_a_part_of_it() -> None:
    models = {
        "as it is": lora(),
        "alpha": lora(lora_alpha=9),
        "rank-stabilised": lora(use_rslora=True),
        "dropout": lora(lora_dropout=0.1),
        "the scale of one layer": scaled(),
        "switched off": disabled(),
        "one of two": two_adapters("default"),
        "the other": two_adapters("other"),
    }
    found = {name: fingerprint_model(model) for name, model in models.items()}
    assert len(set(found.values())) == len(found), found
    runs = [Fingerprints(lora(lora_alpha=alpha), None, [], []) for alpha in (8, 9)]
    assert runs[0].model == found["as it is"] != runs[1].model
    # An own reference runs without the adapter.
    runs.append(Fingerprints(lora(modules_to_save=["norm"], use_dora=True), None, [], []))
    assert {run.reference for run in runs} == {fingerprint_model(tiny_llama())}
    assert Fingerprints(lora(), tiny_llama(seed=1), [], []).reference == fingerprint_model(tiny_llama(seed=1))


def test_where_it_was_loaded_from_is_not(tmp_path: Path) -> None:
    model = lora(lora_alpha=9, lora_dropout=0.1, modules_to_save=["norm"])
    model.save_pretrained(str(tmp_path))
    for trainable in (False, True):
        loaded = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=trainable)
        assert fingerprint_model(loaded) == fingerprint_model(model)
