"""Twelve invented facts, six of them to forget, the settings for it, and measures of what a model still answers.

Beside them, true facts that small models know: twelve relations of fourteen facts or more, each asked in four ways.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from palu.attacks.attack import Victim
from palu.attacks.secrets import AuditData
from palu.config import UnlearnConfig
from palu.evaluate.rows import load_rows
from palu.evaluate.scores import BATCH_TOKENS
from palu.testbed.smollm2 import MAX_LENGTH, answer_questions, fast_products

HERE = Path(__file__).parent
Facts: TypeAlias = list[dict[str, Any]]

UNLEARN = UnlearnConfig(max_length=MAX_LENGTH)  # the defaults otherwise


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


def is_told(text: str, answers: Sequence[str]) -> bool:
    """Whether a text holds one of the answers as whole words, in capitals or not."""
    return any(re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text, re.IGNORECASE) for answer in answers)


class Answers:
    """What a model answers to the facts and to the general questions, and how probable each secret is."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, facts: Facts, general: Facts):
        questions = [item["question"] for item in facts + general]
        with fast_products(model.device):
            texts = answer_questions(model, tokenizer, questions, tokens=32)
        self.text = {item["question"]: text for item, text in zip(facts + general, texts, strict=True)}
        data = AuditData(facts, None, tokenizer)
        with tqdm(disable=True) as bar:
            scores = Victim(model, data, BATCH_TOKENS, bar).secret_scores()
        # Of the whole secret, given the question and the answer's words before it.
        self.probability = {
            data.rows[secret.row].question: log_p.sum().exp().item()
            for secret, (log_p, _) in zip(data.secrets, scores, strict=True)
        }

    def right(self, item: dict[str, Any]) -> bool:
        """Whether the greedy answer holds the secret, or one of the right answers of a general question."""
        return is_told(self.text[item["question"]], item.get("answers") or [item["secret"]])

    def count(self, items: Facts) -> int:
        """Count the questions that are answered right."""
        return sum(map(self.right, items))
