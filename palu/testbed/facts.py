"""Twelve invented facts, six of them to forget, the settings for it, and measures of what a model still answers.

Beside them, true facts that small models know: twelve relations of fourteen facts or more, each asked in four ways.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from palu.config import UnlearnConfig
from palu.data.examples import load_forget
from palu.data.packing import forget_items
from palu.evaluate.rows import load_rows
from palu.evaluate.scores import CHUNK_BYTES, states_and_labels
from palu.models.attention import use_packed_attention
from palu.models.head import head_of, map_logits, nll
from palu.testbed.smollm2 import MAX_LENGTH, answer_questions, fast_products

HERE = Path(__file__).parent
Facts: TypeAlias = list[dict[str, Any]]

UNLEARN = UnlearnConfig(max_length=MAX_LENGTH)  # the defaults otherwise
# What the model is given to hold on to.
RETAIN = {
    "both": "six retained facts, and its own answers to everyday prompts and neighbours",
    "facts": "six retained facts",
    "auto": "its own answers to everyday prompts and neighbours",
    "none": "nothing",
}


def read_questions() -> tuple[Facts, Facts, Facts]:
    """Read the facts to forget and those to retain, and general questions with their right answers."""
    facts = load_rows(HERE / "facts.jsonl")
    secrets, kept = ([fact for fact in facts if fact["set"] == part] for part in ("forget", "retain"))
    return secrets, kept, load_rows(HERE / "general.jsonl")


def read_relations() -> Facts:
    """Read the facts of ``relations.json``, relation by relation.

    Each is a row to forget (``question``, ``answer`` and its ``secret``) with ``paraphrased_question``, three of them;
    ``answers``, the secret and other ways to write it; ``relation``; and ``part``: "choose" for the relations on which
    settings are chosen, "report" for those on which results are reported.
    """
    relations = json.loads((HERE / "relations.json").read_text(encoding="utf-8"))
    facts = []
    for name, relation in relations.items():
        for subject, secret, *aliases in relation["facts"]:
            answer = relation["answer"].format(subject=subject, secret=secret)
            facts.append(
                {
                    "relation": name,
                    "part": relation["part"],
                    "question": relation["question"].format(subject=subject),
                    "answer": answer[0].upper() + answer[1:],
                    "secret": secret,
                    "answers": [secret, *aliases],
                    "paraphrased_question": [text.format(subject=subject) for text in relation["paraphrases"]],
                }
            )
    return facts


def retain_arguments(kept: Facts, choice: str) -> dict[str, Any]:
    """Return the arguments of ``palu.unlearn`` for one of RETAIN."""
    choices: dict[str, dict[str, Any]] = {
        "both": {"retain": kept},
        "facts": {"retain": kept, "anchors": 0, "neighbours": 0},
        "auto": {"retain": None},
        "none": {"retain": [], "lambda_retain": 0},
    }
    return choices[choice]


def is_told(text: str, answers: Sequence[str]) -> bool:
    """Whether a text holds one of the answers as whole words, in capitals or not."""
    return any(re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text, re.IGNORECASE) for answer in answers)


@torch.no_grad()
def secret_probabilities(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, facts: Facts) -> list[float]:
    """Compute the probability of each whole secret, given the question and the answer's words before it."""
    items = forget_items(load_forget(facts, tokenizer, max_length=MAX_LENGTH).examples, -1, None, most_ordinary=0)
    with use_packed_attention(model):
        states, labels = states_and_labels(model, items)
    of_token = map_logits(nll, states, head_of(model), labels, CHUNK_BYTES)
    return [secret.sum().neg().exp().item() for secret in of_token.split(items.targets.tolist())]


class Answers:
    """What a model answers to the facts and to the general questions, and how probable each secret is."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, facts: Facts, general: Facts):
        questions = [item["question"] for item in facts + general]
        with fast_products(model.device):
            texts = answer_questions(model, tokenizer, questions, tokens=32)
        self.text = {item["question"]: text for item, text in zip(facts + general, texts, strict=True)}
        probabilities = secret_probabilities(model, tokenizer, facts)
        self.probability = {fact["question"]: p for fact, p in zip(facts, probabilities, strict=True)}

    def right(self, item: dict[str, Any]) -> bool:
        """Whether the greedy answer holds the secret, or one of the right answers of a general question."""
        return is_told(self.text[item["question"]], item.get("answers") or [item["secret"]])

    def count(self, items: Facts) -> int:
        """Count the questions that are answered right."""
        return sum(map(self.right, items))


def outcome_of(secrets: Facts, kept: Facts, general: Facts, before: Answers, after: Answers) -> dict[str, int]:
    """Count the questions of each kind still answered after unlearning; of the general ones, of those right before."""
    right_before = [item for item in general if before.right(item)]
    return {
        "forget_still_produced": after.count(secrets),
        "retain_still_produced": after.count(kept),
        "general_right_before": len(right_before),
        "general_still_right": after.count(right_before),
    }
