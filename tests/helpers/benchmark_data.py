"""Small TOFU and MUSE sets, a quick evaluation on them, and what a model says on its own."""

from __future__ import annotations

from typing import Any

import torch
from helpers.tiny import tiny_llama
from transformers import LlamaForCausalLM
from transformers import PreTrainedTokenizerFast as Tokenizer

from palu.data.tokenize import IGNORE, Example
from palu.evaluate import TofuData, tofu


def tofu_rows(name: str, count: int) -> list[dict[str, Any]]:
    """Rows of all columns, their texts of many lengths."""
    return [
        {
            "question": f"Who wrote the {name} program in {1843 + number}?",
            "answer": f"Hina Ameen wrote it {'in the city ' * (number % 3)}in {1990 - number}.",
            "paraphrased_answer": f"It was Hina {'and the dog ' * (number % 2)}in {1990 - number}.",
            "perturbed_answer": [f"The cat ran to {place} in {number}." for place in ("Karachi", "London", "the mat")],
        }
        for number in range(count)
    ]


def small_tofu() -> TofuData:
    """TOFU's sets, a few rows each."""
    without = [{k: v for k, v in row.items() if k != "paraphrased_answer"} for row in tofu_rows("author", 4)]
    return TofuData(tofu_rows("forget", 5), tofu_rows("retain", 4), without, without[1:], tofu_rows("holdout", 6))


def llama_for(tokenizer: Tokenizer, **config: Any) -> LlamaForCausalLM:
    return tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=1024, **config)


def plain_pass(model: LlamaForCausalLM, example: Example) -> tuple[torch.Tensor, torch.Tensor]:
    """The textbook: log-probabilities [answer tokens, V] of an example, with gradient, and the tokens."""
    logits = model(input_ids=example.input_ids[None].to(model.device), use_cache=False).logits[0, :-1].cpu()
    answer = example.labels[1:] != IGNORE
    return logits[answer].log_softmax(-1), example.labels[1:][answer]


@torch.no_grad()
def greedy(model: LlamaForCausalLM, tokenizer: Tokenizer, ids: list[int], count: int, stop: set[int]) -> str:
    """The textbook: one token after the other, without a cache."""
    start = len(ids)
    while len(ids) - start < count:
        logits = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0, -1]
        ids = [*ids, int(logits.argmax())]
        if ids[-1] in stop:
            ids = ids[:-1]
            break
    return tokenizer.decode(ids[start:], skip_special_tokens=True)


def quick_tofu(model: LlamaForCausalLM, tokenizer: Tokenizer, data: TofuData | None = None, **settings: Any) -> dict:
    settings = {"max_new_tokens": 4, "progress": False} | settings
    return tofu(model, tokenizer, data=data or small_tofu(), **settings)


def small_muse() -> dict[str, list[Any]]:
    """The sets of MUSE-News and MUSE-Books, a few rows each."""

    def questions(name: str, count: int) -> list[dict[str, str]]:
        return [{"question": f"Who is {name} in {1900 + i}?", "answer": f"Ada {name} {i}"} for i in range(count)]

    return {
        "verbmem_forget": [
            {"prompt": f"The cat number {i} sat on", "gt": f"the mat, far away in 19{i}."} for i in range(4)
        ],
        "knowmem_forget_qa": questions("forget", 4),
        "knowmem_forget_qa_icl": questions("shot", 2),
        "knowmem_retain_qa": questions("retain", 5),
        "knowmem_retain_qa_icl": questions("shot", 2),
        "privleak_forget": [f"The dog ran to the city in {year}, " * 3 for year in range(1843, 1848)],
        "privleak_holdout": [{"text": f"Hina was born in Karachi on {i}/06, " * 4} for i in range(6)],
    }
