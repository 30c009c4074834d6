"""Models and data for the speed benchmarks: Llamas of the true shape with random weights, examples of TOFU's lengths.

Nothing is downloaded. What a step costs depends on shapes and on how many tokens have which role, not
on what the weights or the tokens are, so token ids are random.
"""

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from palu.data.tokenize import IGNORE, ORDINARY, Example

SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
MODELS: dict[str, dict[str, Any]] = {
    name: dict(zip((*SIZES, "vocab_size", "tie_word_embeddings"), sizes, strict=True))
    for name, sizes in {
        "llama-3.1-8b": (4096, 14336, 32, 32, 8, 128256, False),
        "llama-3.2-1b": (2048, 8192, 16, 32, 8, 128256, True),
        "smollm2-135m": (576, 1536, 30, 9, 3, 49152, True),
        "tiny": (32, 64, 2, 4, 2, 512, False),
    }.items()
}


def make_model(name: str, device: torch.device, dtype: torch.dtype) -> LlamaForCausalLM:
    """Make a Llama of that shape in training mode, its weights drawn on the device: normal, 0.02."""
    with torch.device(device):
        config = LlamaConfig(**MODELS[name])
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").train()


# --- lengths ---
# Lengths are drawn from what palu.data makes of TOFU with SmolLM2's tokenizer (plus a
# beginning of sequence). Tokens at minimum, deciles and maximum of forget05 (200 rows) and retain90 (3600):
PROMPT_DECILES = {
    "forget": (16, 18, 20, 21, 22, 23, 24, 25, 27, 31, 46),
    "retain": (11, 17, 19, 20, 21, 22, 23, 24, 26, 29, 56),
}
ANSWER_DECILES = {
    "forget": (11, 21, 26, 30, 33, 36, 39, 42, 45, 51, 69),
    "retain": (6, 20, 25, 29, 32, 35, 38, 41, 45, 50, 95),
}
# How many answers of forget05 have 0, 1, ... spans, and how many spans have 1, 2, ... tokens (the last
# entry gathers those of 7 to 16).
SPANS_PER_ANSWER = (4, 38, 60, 47, 38, 10, 3)
TOKENS_PER_SPAN = (97, 193, 89, 65, 26, 23, 0, 0, 0, 27)

# Tokens of prompt and of answer, and [start, end) of each span in the answer.
Lengths = tuple[int, int, list[tuple[int, int]]]


def drawn_lengths(part: str, count: int, rng: random.Random) -> Iterator[Lengths]:
    """Draw lengths of the same distribution: prompt, answer and spans independently."""
    for _ in range(count):
        prompt, answer = (
            round(float(np.interp(10 * rng.random(), range(11), deciles[part])))
            for deciles in (PROMPT_DECILES, ANSWER_DECILES)
        )
        spans = []
        if part == "forget":
            number = rng.choices(range(len(SPANS_PER_ANSWER)), SPANS_PER_ANSWER)[0]
            sizes = rng.choices(range(1, len(TOKENS_PER_SPAN) + 1), TOKENS_PER_SPAN, k=number)
            while sum(sizes) + len(sizes) > answer - 1:  # an ordinary token parts two spans
                sizes.pop()
            # Spread the tokens that are in no span over the gaps before, between and after the spans.
            free = answer - 1 - sum(sizes) - len(sizes)
            edges = sorted(rng.randint(0, free) for _ in sizes)
            start = 0
            for size, edge, previous in zip(sizes, edges, [0, *edges], strict=False):
                start += edge - previous
                spans.append((start, start + size))
                start += size + 1
        yield prompt, answer, spans


def make_batches(
    vocab_size: int, batches: int, forget: int, retain: int, seed: int, system: int = 0
) -> list[tuple[list[Example], list[Example]]]:
    """Make batches of forget and retain examples. The last token of each answer, vocab_size - 1, ends the sequence.

    ``system``: tokens with which all of them begin, before their prompts.
    """
    rng = random.Random(seed)
    tokens = torch.Generator().manual_seed(seed)
    sizes = {"forget": forget, "retain": retain}
    examples: dict[str, list[Example]] = {part: [] for part in sizes}
    for part, size in sizes.items():
        for prompt, answer, spans in drawn_lengths(part, size * batches, rng):
            ids = torch.randint(vocab_size - 1, (prompt + answer,), generator=tokens)
            ids[-1] = vocab_size - 1
            ids, prompt = torch.cat([torch.arange(system), ids]), system + prompt
            labels = ids.clone() if part == "retain" else torch.full_like(ids, ORDINARY)
            labels[:prompt] = IGNORE
            for start, end in spans:
                labels[prompt + start : prompt + end] = ids[prompt + start : prompt + end]
            examples[part].append(Example(len(examples[part]), ids, labels))
    return [
        (examples["forget"][i * forget : (i + 1) * forget], examples["retain"][i * retain : (i + 1) * retain])
        for i in range(batches)
    ]
