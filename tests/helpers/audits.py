"""An audit of a recorded run whose attacks are staged: it takes no time, and has a row of every kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers.report_runs import FORGET, RETAIN, Run, write
from helpers.tiny import tiny_llama
from transformers import AutoModelForCausalLM

from palu.attacks.attack import Finding, Victim
from palu.attacks.run import audit_models
from palu.attacks.secrets import AuditData


@dataclass(frozen=True)
class Staged:
    """An attack that gets the secrets ``told`` out of the unlearned model, and ``guessed`` out of the retain model."""

    key: str
    name: str
    told: tuple[int, ...] = ()
    guessed: tuple[int, ...] = ()
    lacks: str | None = None
    reads_retain = False

    @property
    def budget(self) -> str:
        return f"the budget of {self.key}"

    @property
    def described(self) -> dict[str, Any]:
        return {"attack": self.key, "budget": self.budget, "settings": {}}

    def skip_reason(self, data: AuditData, model: Any) -> str | None:
        return self.lacks

    def run(self, victim: Victim) -> list[Finding]:
        answers = [victim.data.rows[secret.row].answer for secret in victim.data.secrets]
        every = range(len(answers))
        told: Sequence[int] = {"unlearned": self.told, "retain": self.guessed, "original": every}[victim.model.role]
        values: list[float | None] = [float(i in told) for i in every]
        evidence: list[Any] = [answer if i in told else "No." for i, answer in enumerate(answers)]
        if self.key == "sample":
            evidence = [{"draws": 2, "told": 2 * (i in told), "first": answers[i].upper()} for i in every]
        elif self.key == "relearn":
            values[-1], evidence = None, [["No.", answer] for answer in evidence]
        elif self.key == "onset":
            evidence = [{"log_probability": -0.5}] * len(answers)
        elif self.key == "lens":
            evidence = [{"layer": 2, "rank": 3}] * len(answers)
        figures = {"utility unrounded": 0.9, "utility": 0.8} if self.key == "quantise" else {}
        return [Finding(self.name, values, evidence, figures)]


ATTACKS = (
    Staged("ask", "ask: greedy", told=(0, 4), guessed=(4,)),
    Staged("ask-paraphrased", "", lacks="the forget set has no column 'paraphrased_question'"),
    Staged("sample", "sample: leak@2", told=(0,)),
    Staged("onset", "onset: 1 in the answer", told=(3,)),
    Staged("quantise", "quantise: int4"),
    Staged("relearn", "relearn: lora", told=(0,)),
    Staged("lens", "inside: lens", told=tuple(range(5))),
)


def write_audit(run: Run, folder: Path, *, retain: bool = True) -> dict[str, Any]:
    """Write ``private/audit.json`` into a copy of the run's folder."""
    models: dict[str, Any] = {
        "unlearned": AutoModelForCausalLM.from_pretrained(run.folder / "model"),
        "original": tiny_llama(vocab_size=len(run.tokenizer)),
    }
    if retain:
        models["retain"] = tiny_llama(vocab_size=len(run.tokenizer), seed=1)
    for role, model in models.items():
        model.role = role
    audit = audit_models(
        {role: (lambda model=model: model) for role, model in models.items()},
        AuditData(FORGET, RETAIN, run.tokenizer),
        ATTACKS,
        seed=0,
        quick=True,
        only=[attack.key for attack in ATTACKS],
        progress=False,
    )
    write(folder, audit, "audit.json")
    return audit
