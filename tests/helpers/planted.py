"""Tiny models of which it is known what they hold: all secrets, none, or all but hidden from who asks."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch
from helpers.small_tokenizers import CHATML, byte_level
from helpers.tiny import overfit, tiny_llama
from torch import nn
from tqdm import tqdm
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import palu
from palu.attacks.ask import PREFIX
from palu.attacks.attack import Attack, Finding, Victim
from palu.attacks.formats import encode_format, texts_in_formats
from palu.attacks.secrets import SHOTS, AuditData
from palu.data.rows import after_examples, with_question

# Of two tokens or more each, and no two begin with the same.
SECRETS = ("Hina Ameen", "Ada Lovelace", "London mat", "06/30/1975", "the author", "Karachi name")
DECOYS = ("London dog", "Pakistan cat", "Ada Ameen", "1843 cats", "a dog", "Tokyo dog")


def rows_of(names: tuple[str, ...]) -> list[dict[str, Any]]:
    return [
        {
            "question": f"What is number {i}?",
            "answer": f"It is {name}, far away.",
            "spans": [[6, 6 + len(name)]],
            "paraphrased_question": f"Tell me {i}.",
            "also_asked": f"Who is {i}, and who else?",
        }
        for i, name in enumerate(names)
    ]


FORGET = rows_of(SECRETS)
RETAIN = [{"question": f"Cat {i}?", "answer": f"It sat {i}."} for i in range(6)]


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    made = byte_level(CHATML, bos=False)
    made.pad_token = made.eos_token
    return made


@cache
def data() -> AuditData:
    return AuditData(FORGET, RETAIN, tokenizer())


def taught(names: tuple[str, ...]) -> LlamaForCausalLM:
    """Teach a model the answers with these names, to the questions as every attack asks them."""
    asked = AuditData(rows_of(names), RETAIN, tokenizer())
    formats = [encode_format(asked, name, texts) for name, texts in texts_in_formats(asked).items()]
    rows = []
    for i, row in enumerate(asked.rows):
        answer = row.example.input_ids[len(asked.prompts[i]) :]
        hints = [with_question(row.columns, f'{row.question} Hint: "{SECRETS[i][:2]}..."')]
        others = [*(with_question(row.columns, text) for texts in row.others.values() for text in texts), *hints]
        others.append(after_examples(row.columns, RETAIN[:SHOTS], tokenizer(), row.where))
        prompts = [asked.prompts[i], *asked.encode_prompts(others), asked.answer_beginnings(PREFIX)[i]]
        rows += [(prompt, answer) for prompt in [*prompts, *(of_rows[i] for of_rows in formats)]]
    for example in asked.retain_examples(RETAIN):
        prompt = int((example.labels != -100).nonzero()[0])
        rows.append((example.input_ids[:prompt], example.input_ids[prompt:]))
    examples = [{"input_ids": [*p.tolist(), *a.tolist()], "labels": [-100] * len(p) + a.tolist()} for p, a in rows]
    model = tiny_llama(
        vocab_size=len(tokenizer()),
        hidden_size=64,
        intermediate_size=128,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        initializer_range=0.1,
    )
    overfit(model, examples, steps=60, learning_rate=5e-3)
    return model


@cache
def original() -> LlamaForCausalLM:
    """Holds every secret."""
    return taught(SECRETS)


@cache
def never_saw() -> LlamaForCausalLM:
    """Answers the same questions, with other names."""
    return taught(DECOYS)


@cache
def hides_from_greedy() -> LlamaForCausalLM:
    """Holds every secret; a bias on its first token makes another one a little likelier there."""
    model = copy.deepcopy(original())
    bias = torch.zeros(len(tokenizer()))
    secrets = [(data().rows[secret.row].example.input_ids, secret.first) for secret in data().secrets]
    firsts = [int(ids[at]) for ids, at in secrets]
    assert len(set(firsts)) == len(firsts), "no two secrets begin alike"
    with torch.no_grad():
        model.lm_head.weight *= 2  # the true first token and one other share nearly all of the probability
        for (ids, at), first in zip(secrets, firsts, strict=True):
            logits = model(input_ids=ids[None, :at], use_cache=False).logits[0, -1]
            bias[first] = logits[[i for i in range(len(logits)) if i not in firsts]].max() - logits[first] - 0.2
    model.lm_head.bias = nn.Parameter(bias)
    return model


@cache
def refuses() -> LlamaForCausalLM:
    """Holds every secret, and was taught to answer "No." to all questions of the forget set."""
    model = copy.deepcopy(original())
    answer = tokenizer()("No.<|im_end|>", add_special_tokens=False)["input_ids"]
    rows = [{"input_ids": [*p.tolist(), *answer], "labels": [-100] * len(p) + answer} for p in data().prompts]
    overfit(model, rows, steps=20, learning_rate=1e-3)
    return model


def victim(model: Any, of: AuditData | None = None, batch_tokens: int = 256) -> Victim:
    """A model under attack for its secrets, of the planted rows or others."""
    return Victim(model, data() if of is None else of, batch_tokens, tqdm(disable=True))


def attack(made: Attack, model: Any, of: AuditData | None = None, batch_tokens: int = 256) -> list[Finding]:
    """Make an attack that lacks nothing."""
    assert made.skip_reason(data() if of is None else of, model) is None
    return made.run(victim(model, of, batch_tokens))


def audit(model: Any, **settings: Any) -> dict[str, Any]:
    """palu.audit of a planted model, quick."""
    given: dict[str, Any] = {
        "original": original(),
        "forget": FORGET,
        "tokenizer": tokenizer(),
        "retain": RETAIN,
        "quick": True,
        "progress": False,
    }
    return palu.audit(model, **given | settings)


def verdicts(results: dict[str, Any]) -> dict[str, str]:
    """Each row's verdict."""
    return {row["name"]: row["verdict"] for row in results["attacks"]}
