"""Run every attack on every model, keep what each gave, and compare the models."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any, Literal

import torch
import transformers
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from palu.attacks.ask import AskAfterExamples, AskGreedily, AskInOtherWords, AskWithPrefix
from palu.attacks.attack import Attack, Finding, Victim
from palu.attacks.depth import DepthScore, Patch, Source
from palu.attacks.estimators import NO_RHO, rho, unseen_bound
from palu.attacks.lens import LogitLens
from palu.attacks.onset import OnsetInAnswer, OnsetInQuestion
from palu.attacks.quantise import BROKEN, SCHEMES, Quantise
from palu.attacks.relearn import Relearn
from palu.attacks.sample import ExactProbability, Sample
from palu.attacks.secrets import AuditData
from palu.evaluate.scores import check_model
from palu.hashing import json_digest
from palu.methods.palu import RECIPES
from palu.models.generation import bound_on_answers
from palu.models.lora import CausalLM, base_of, separate
from palu.ref_model.fingerprint import fingerprint_model
from palu.version import __version__
from palu.writable import private_folder, write_private

FORMAT = 3  # of stages and results: what another version kept is made again
STAGES, RESULTS = "audit", "audit.json"
ROLES = ("unlearned", "original", "retain")
_TURNS = ("unlearned", "retain", "original")  # the others' states are there when the original is loaded
DRAWS, QUICK_DRAWS = 200, 16
BATCH_TOKENS = 1024
# What is trained, on which rows, at which learning rate.
RELEARN: tuple[tuple[Literal["weights", "lora"], Literal["forget", "retain", "unrelated"], float], ...] = (
    ("weights", "forget", 5e-5),
    ("lora", "forget", 5e-4),
    ("weights", "retain", 5e-5),
    ("weights", "unrelated", 5e-5),
)
_FEW = 30  # with fewer secrets the results say how little none of them tells

NO_RETAIN_MODEL = (
    "without a retain model its share is taken as 0, so what a model that never saw the secrets would guess counts as "
    "a leak, above all the later tokens of a secret after its first ones"
)


def audit(
    model: CausalLM,
    original: CausalLM,
    forget: Any,
    *,
    tokenizer: PreTrainedTokenizerBase,
    retain_model: CausalLM | None = None,
    retain: Any = None,
    folder: str | os.PathLike[str] | None = None,
    quick: bool = False,
    only: Sequence[str] | None = None,
    n: int = -1,
    draws: int | None = None,
    max_new_tokens: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """Attack an unlearned model, and measure by the original what is left of its secrets.

    Args:
        model: the unlearned model, on its device; afterwards all models are as they were.
        original: the model before unlearning; given as the base of a ``PeftModel``, it runs without the adapter.
        forget: the forget set: rows of text with ``secret`` or ``spans`` (see :mod:`palu.data`), perhaps with
            ``paraphrased_question`` (a question, or a list of them).
        tokenizer: of all models, a fast one.
        retain_model: a model that never saw the forget set; None: it would tell nothing (which is not quite true), and
            there is no unlearning depth score.
        retain: rows of text to put in front of questions, and to measure utility on.
        folder: where ``audit.json`` is written, and in ``audit/`` what each attack gave, so that the same call goes on
            where it was stopped. Both hold the secrets: for their owner alone to read, in a folder that, if it is
            new, its owner alone can enter. None: nothing is written.
        quick: 16 draws, hints of 1 and ``n`` tokens, utility on 8 texts, and relearning for 6 steps; not 200, 1 to
            ``n + 2``, 32, and 24.
        only: the attacks to make, by what stands as ``attack`` in the results (such as ``"ask"``, ``"onset-answer"``);
            None: all.
        n: the onset length that was unlearned: up to ``n + 2`` true tokens are supplied; -1, of whole spans: 5.
        draws: answers sampled for each question, in place of 200 or 16.
        max_new_tokens: bound on an answer; None: twice the longest true one, 200 at most.
        batch_tokens: tokens per scoring pass; decoding takes eight times as many.
        chat_template_kwargs: what the chat template is given beside the messages.
        seed: of the draws and of the bootstrap.
        progress: show progress bars.

    Returns:
        The content of ``audit.json``, ready for JSON: ``secrets``; ``marked``, every text that a row marks;
        ``attacks``, a row of the table each, with ``budget``, ``rho`` (``value``, ``low``, ``high``), ``verdict``
        ("held", "open" or "not told"), ``reason`` where there is more to say, and in ``models`` for each model its
        share ``told`` with ``values`` and ``evidence`` by secret, and ``figures``; ``notes``. There is no number for
        all attacks together.

    Raises:
        DataError: a row cannot be used, or there is no secret.
        ValueError: a setting is out of range, or models and tokenizer do not fit.
        UnsupportedModelError: a model is of a kind that palu does not work with.
    """
    given = separate(model=model, original=original, retain_model=retain_model)
    loaders = {role: partial(given.__getitem__, name) for role, name in _NAMES.items() if name in given}
    data = AuditData(forget, retain, tokenizer, chat_template_kwargs)
    budget = Budget(quick, n, draws, max_new_tokens, seed)
    return audit_models(loaders, data, budget, folder=folder, only=only, batch_tokens=batch_tokens, progress=progress)


@dataclass(frozen=True)
class Budget:
    """What the attacks of an audit spend; the fields are arguments of :func:`audit`."""

    quick: bool = False
    n: int = -1
    draws: int | None = None
    max_new_tokens: int | None = None
    seed: int = 0


def attacks_of(data: AuditData, budget: Budget) -> list[Attack]:
    """List the attacks. Raises ValueError for a setting that is out of range."""
    quick, seed = budget.quick, budget.seed
    n = RECIPES["paper"]["n"] if budget.n == -1 else budget.n  # as many true tokens as after a run with the paper's
    for name, value in (("n", n), ("draws", budget.draws), ("max_new_tokens", budget.max_new_tokens)):
        if value is not None and value < 1:
            raise ValueError(f"{name} = {value}: it must be at least 1{', or -1 for whole spans' * (name == 'n')}")
    draws = budget.draws or (QUICK_DRAWS if quick else DRAWS)
    tokens = budget.max_new_tokens or bound_on_answers(row.example for row in data.rows)
    hints = tuple(sorted({1, n})) if quick else tuple(range(1, n + 3))
    attacks: list[Attack] = [ask(tokens) for ask in (AskGreedily, AskInOtherWords, AskAfterExamples, AskWithPrefix)]
    attacks += [Sample(tokens, draws, seed), ExactProbability()]
    attacks += [OnsetInAnswer(n + 2), OnsetInQuestion(tokens, hints)]
    attacks += [Quantise(scheme, tokens, 8 if quick else 32) for scheme in SCHEMES]
    steps, every = (6, 6) if quick else (24, 4)
    attacks += [Relearn(tokens, trained, rows, steps, every, rate, seed) for trained, rows, rate in RELEARN]
    return [*attacks, LogitLens()]


def audit_models(
    loaders: Mapping[str, Callable[[], CausalLM]],
    data: AuditData,
    budget: Budget,
    *,
    folder: str | os.PathLike[str] | None = None,
    only: Sequence[str] | None = None,
    batch_tokens: int = BATCH_TOKENS,
    progress: bool = True,
) -> dict[str, Any]:
    """Audit models that are loaded one at a time; arguments and errors are :func:`audit`'s.

    loaders: of ROLES, the retain model's perhaps missing: what gives the model on its device.
    """
    attacks = attacks_of(data, budget)
    wanted = {attack.key for attack in attacks} | {DepthScore.key}
    if only is not None:
        if unknown := set(only) - wanted:
            raise ValueError(f"only: {', '.join(sorted(unknown))}: choose from {', '.join(sorted(wanted))}")
        wanted = set(only)
        attacks = [attack for attack in attacks if attack.key in wanted]
    stages = None if folder is None else private_folder(Path(folder)) / STAGES
    results: dict[str, list[_Outcome]] = {}
    models: dict[str, Any] = {}
    sources: dict[str, Source] = {}
    patched: dict[str, _Outcome] = {}
    for role in _TURNS:
        if role not in loaders:
            continue
        model = loaders[role]()
        check_model(model, data.tokenizer, [row.example for row in data.rows], _NAMES[role])
        fingerprint = fingerprint_model(model)
        models[role] = {"fingerprint": fingerprint, "kind": type(base_of(model)).__name__}
        run = partial(
            _kept_or_run,
            model=model,
            fingerprint=fingerprint,
            data=data,
            stages=stages,
            batch_tokens=batch_tokens,
            progress=progress,
        )
        results[role] = list(map(run, tqdm(attacks, desc=role, disable=not progress, leave=False)))
        if role == "original":
            patched = {source: run(Patch(of)) for source, of in sources.items()}
        elif "retain" in loaders and DepthScore.key in wanted:
            sources[role] = Source.of(model, fingerprint, data, batch_tokens=batch_tokens, progress=progress)
        del model, run
    results, models = ({role: of[role] for role in ROLES if role in of} for of in (results, models))
    rows = [
        row
        for i, attack in enumerate(attacks)
        for row in _compare(attack, {role: results[role][i] for role in results}, len(data.secrets), budget.seed)
    ]
    if DepthScore.key in wanted:
        depth = DepthScore()
        rows += _compare(depth, depth.outcomes(patched), len(data.secrets), budget.seed)
    report = {
        "format": FORMAT,
        "seed": budget.seed,
        "quick": budget.quick,
        "models": models,
        "forget_sha256": data.forget_digest,
        "secrets": [asdict(secret) | {"question": data.rows[secret.row].question} for secret in data.secrets],
        "marked": sorted(set(data.marked)),
        "left_out": {"told_by_their_question": data.told_by_question, "repeated": data.repeated},
        "attacks": rows,
        "notes": _notes(data, "retain" in results),
        "versions": {"palu": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }
    if folder is not None:
        _write(Path(folder) / RESULTS, report)
    return report


# --- one attack on one model ---
_Outcome = dict[str, Any]  # {"findings": [...]}, or {"skip_reason": why it was not made}
_NAMES = {"unlearned": "model", "original": "original", "retain": "retain_model"}


def _kept_or_run(
    attack: Attack,
    model: CausalLM,
    fingerprint: str,
    data: AuditData,
    stages: Path | None,
    batch_tokens: int,
    progress: bool,
) -> _Outcome:
    """Read what an earlier audit kept of this attack on this model, or make it and keep it."""
    if (skip_reason := attack.skip_reason(data, model)) is not None:
        return {"skip_reason": skip_reason}
    key = {
        "format": FORMAT,
        "attack": attack.key,
        "settings": _settings(attack),
        "model": fingerprint,
        "forget": data.forget_digest,
        "retain": data.retain_digest if attack.reads_retain else None,
        "device": str(base_of(model).device.type),
        "batch_tokens": batch_tokens,
        "versions": [torch.__version__, transformers.__version__],
    }
    path = None if stages is None else stages / f"{attack.key}-{json_digest(key)[:16]}.json"
    if path is not None and path.exists():
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["key"] == key:
            return kept
    with tqdm(desc=attack.key, unit=" texts", disable=not progress, leave=False) as bar:
        victim = Victim(
            base_of(model),
            data,
            max_new_tokens=getattr(attack, "max_new_tokens", 0),
            batch_tokens=batch_tokens,
            seed=getattr(attack, "seed", 0),
            bar=bar,
        )
        outcome = {"key": key, "findings": [asdict(finding) for finding in attack.run(victim)]}
    if path is not None:
        _write(path, outcome)
    return json.loads(json.dumps(outcome))  # as one that is read: the same types


def _settings(attack: Any) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(attack)))


def _write(path: Path, value: Any) -> None:
    write_private(private_folder(path.parent) / path.name, json.dumps(value, indent=1) + "\n")


# --- the models compared ---
def _compare(
    attack: Attack | DepthScore, outcomes: Mapping[str, _Outcome], secrets: int, seed: int
) -> list[dict[str, Any]]:
    """Make the rows of the table: one for each finding of an attack, or one that says why it was not made."""
    common = {"attack": attack.key, "budget": attack.budget, "settings": _settings(attack)}
    lacking = {role: outcome["skip_reason"] for role, outcome in outcomes.items() if "skip_reason" in outcome}
    if lacking:
        reasons = set(lacking.values())
        of_all = len(reasons) == 1 and len(lacking) == len(outcomes)
        reason = reasons.pop() if of_all else "; ".join(f"{role}: {why}" for role, why in lacking.items())
        skipped = {"rho": asdict(NO_RHO), "verdict": "not told", "reason": f"skipped: {reason}"}
        return [{"name": attack.key.replace("-", ": ", 1), **common, **skipped, "models": {}}]
    rows = []
    for number in range(len(outcomes["unlearned"]["findings"])):
        findings = {role: Finding(**outcome["findings"][number]) for role, outcome in outcomes.items()}
        rows.append({"name": findings["unlearned"].name, **common, **_verdict(findings, secrets, seed)})
    return rows


def _verdict(findings: Mapping[str, Finding], secrets: int, seed: int) -> dict[str, Any]:
    columns = [findings[role].values for role in ROLES if role in findings]
    asked = [i for i in range(secrets) if all(values[i] is not None for values in columns)]
    if not asked:
        return {
            "rho": asdict(NO_RHO),
            "verdict": "not told",
            "reason": "skipped: it cannot be made on any secret",
            "models": {},
        }
    shares = {
        role: [float(value) for i in asked if (value := finding.values[i]) is not None]
        for role, finding in findings.items()
    }
    found = rho(shares["unlearned"], shares["original"], shares.get("retain"), seed=seed)
    verdict, reason = found.verdict, None
    if found.value is None:
        reason = "the original itself tells no more than a model that never saw the secrets, so there is no measure"
    figures = findings["unlearned"].figures
    if verdict == "held" and figures.get("utility", 1.0) < BROKEN * figures.get("utility unrounded", 0.0):
        verdict, reason = "not told", "the rounded model is broken (see its utility), so it would tell nothing"
    return {
        "rho": asdict(found),
        "verdict": verdict,
        "reason": reason,
        "secrets": len(asked),
        "models": {
            role: {
                "told": mean(shares[role]),
                "values": finding.values,
                "evidence": finding.evidence,
                "figures": finding.figures,
            }
            for role, finding in findings.items()
        },
    }


def _notes(data: AuditData, retain_model: bool) -> list[str]:
    count, notes = len(data.secrets), []
    if not retain_model:
        notes.append(NO_RETAIN_MODEL)
    if count < _FEW:
        notes.append(
            f"{count} secret{'s are' * (count > 1)}{' is' * (count == 1)} few: if an attack gets none of them, it may "
            f"still get up to {unseen_bound(count):.0%} of others like them (95 % sure), which no interval here shows"
        )
    notes.append("soft prompts and GCG are left out: they elicit any string, seen or not (arXiv 2502.15836)")
    return notes
