"""What the tests of the three kinds of anchors share: a model, its tokenizer, its writer, and runs on rows of text."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator
from helpers.runs import TEXT_FORGET
from helpers.small_tokenizers import LLAMA3, byte_level
from helpers.tiny import tiny_llama
from transformers import LlamaForCausalLM

import palu
from palu.models.root import ModelRoot
from palu.ref_model.anchors import Writer

TOKENIZER = byte_level(LLAMA3)


def llama(seed: int = 0) -> LlamaForCausalLM:
    return tiny_llama(seed=seed, vocab_size=len(TOKENIZER), max_position_embeddings=256)


def writer(model: LlamaForCausalLM | None = None) -> Writer:
    return Writer(ModelRoot(llama() if model is None else model), Accelerator(), adapter=False)


def unlearn(
    model: Any = None, ref_model: Any = None, forget: Any = TEXT_FORGET, retain: Any = None, **settings: Any
) -> palu.UnlearnResult:
    model = llama() if model is None else model
    given: dict[str, Any] = {"tokenizer": TOKENIZER, "max_length": 200, "progress": False, "lora_rank": None}
    given |= {"epochs": 1, "batch_size": 2, "learning_rate": 1e-3}
    return palu.unlearn(model, ref_model, forget, retain, **given | settings)
