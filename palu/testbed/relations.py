"""True facts that small models know: twelve relations of fourteen facts or more, each asked in four ways."""

from __future__ import annotations

import json

from palu.testbed.facts import HERE, Facts


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
