"""palu.audit: what it returns, that stages are kept, and that wrong input is told at once."""

from __future__ import annotations

import copy
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import planted
from helpers.planted import FORGET, RETAIN, SECRETS, audit, hides_from_greedy, never_saw, original, tokenizer, verdicts
from helpers.tiny import same_weights, tiny_llama, weights
from peft import LoraConfig, get_peft_model

from palu.attacks.ask import AskGreedily
from palu.attacks.quantise import Quantise
from palu.attacks.relearn import Relearn
from palu.attacks.sample import Sample
from palu.models.lora import separate


# --- what is returned ---
def test_results_hold_everything_by_secret_and_no_number_for_all() -> None:
    results = audit(hides_from_greedy(), retain_model=never_saw())
    assert results == json.loads(json.dumps(results))
    assert set(results) == {
        *("format", "seed", "quick", "models", "forget_sha256", "secrets", "marked", "left_out", "attacks", "notes"),
        "versions",
    }
    assert [secret["text"] for secret in results["secrets"]] == list(SECRETS)
    assert results["marked"] == sorted(SECRETS)
    assert list(results["models"]) == ["unlearned", "original", "retain"]
    for row in results["attacks"]:
        assert row["budget"] and list(row["models"]) == ["unlearned", "original", "retain"]
        for of_model in row["models"].values():
            assert len(of_model["values"]) == len(of_model["evidence"]) == len(SECRETS)
            known = [value for value in of_model["values"] if value is not None]
            assert of_model["told"] == pytest.approx(sum(known) / len(known))
            assert row["secrets"] == len(known)


def test_only_some_attacks() -> None:
    whole = audit(hides_from_greedy(), retain_model=never_saw())["attacks"]
    some = audit(hides_from_greedy(), retain_model=never_saw(), only=["onset-answer", "ask"])["attacks"]
    assert some == [row for row in whole if row["attack"] in ("ask", "onset-answer")]
    (depth,) = audit(hides_from_greedy(), retain_model=never_saw(), only=["inside-depth"])["attacks"]
    assert depth == whole[-1]
    with pytest.raises(ValueError, match=r"only: asking: choose from ask, ask-examples, ask-paraphrased, .*, sample"):
        audit(hides_from_greedy(), only=["asking"])


@pytest.mark.parametrize("only", ["ask", "inside-depth"])
def test_what_is_written_is_its_owners(only: str, tmp_path: Path) -> None:
    """Also where every attack is skipped, as the depth is without a retain model."""
    before = os.umask(0)
    try:
        results = audit(never_saw(), folder=tmp_path / "new" / "found", only=[only], max_new_tokens=1)
    finally:
        os.umask(before)
    found = tmp_path / "new" / "found"
    assert json.loads((found / "audit.json").read_text(encoding="utf-8")) == results
    kept = [*found.glob("audit/*")]
    assert bool(kept) == (only == "ask")
    for path, mode in [(found, 0o700), (found / "audit.json", 0o600), *((path, 0o600) for path in kept)]:
        assert stat.S_IMODE(path.stat().st_mode) == mode, path
    assert all(stat.S_IMODE(path.parent.stat().st_mode) == 0o700 for path in kept)


def test_models_and_random_numbers_are_left_as_they_were() -> None:
    models = [hides_from_greedy(), original()]
    models[0].train()
    before, state = [weights(model) for model in models], torch.random.get_rng_state()
    audit(models[0])
    assert models[0].training and not models[1].training
    models[0].eval()
    assert all(same_weights(model, was) for model, was in zip(models, before, strict=True))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_rho_is_measured_from_the_retain_model() -> None:
    """A model is no better than one that never saw the secrets."""
    results = audit(original(), retain_model=original())
    assert {row["verdict"] for row in results["attacks"]} == {"not told"}
    assert results["attacks"][0]["reason"].startswith("the original itself tells no more than a model that never saw")


def test_what_cannot_be_done_is_a_row_that_says_why() -> None:
    rows = [{name: value for name, value in row.items() if name != "paraphrased_question"} for row in FORGET]
    adapted = get_peft_model(copy.deepcopy(original()), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    results = audit(adapted, forget=rows, retain=None)
    reasons = {row["name"]: row["reason"] for row in results["attacks"] if row["reason"]}
    merge = "skipped: unlearned: the model has a LoRA adapter"
    rounded = f"{merge}, which is not rounded on its own; merge it into the weights"
    trained = f"{merge}; merge it into the weights, which are trained"
    no_rows = "there are no retain rows to train on"
    assert reasons == {
        "ask: paraphrased": "skipped: the forget set has no column 'paraphrased_question'",
        "ask: examples": "skipped: it needs 5 retain rows to put in front, and there are 0",
        **dict.fromkeys(("quantise: int8", "quantise: int4", "quantise: nf4"), rounded),
        **dict.fromkeys(("relearn: weights", "relearn: lora", "relearn: unrelated"), trained),
        "relearn: retain": f"{trained}; original: {no_rows}",
        "inside: depth": "skipped: it needs a retain model, whose states tell which layers hold the secrets",
    }
    assert verdicts(results)["ask: greedy"] == "open"
    assert verdicts(results)["quantise: int8"] == "not told"


def with_adapter(base: Any, **settings: Any) -> Any:
    """PEFT puts the adapter into the base; its weights are the same whatever the settings."""
    torch.manual_seed(5)
    config = {"task_type": "CAUSAL_LM", "target_modules": "all-linear", "init_lora_weights": False} | settings
    return get_peft_model(base, LoraConfig(**config))


def test_a_base_is_audited_as_it_was_before_its_adapter() -> None:
    base, attacks = copy.deepcopy(original()), ["ask", "exact-probability"]
    adapted = with_adapter(base, modules_to_save=["norm"], lora_alpha=64)
    with torch.no_grad():
        adapted.base_model.model.model.norm.modules_to_save["default"].weight.neg_()
    before = weights(adapted)
    alone = audit(adapted, only=attacks)
    told = {role: of_model["told"] for role, of_model in alone["attacks"][0]["models"].items()}
    assert told == {"unlearned": 0.0, "original": 1.0}
    assert audit(adapted, original=base, only=attacks) == alone
    assert audit(base, original=adapted, only=["ask"])["attacks"][0]["models"]["unlearned"]["told"] == 1.0
    assert same_weights(adapted, before) and adapted.get_base_model() is base
    # It shares the weights, and can be attacked as one that never had an adapter.
    bare = separate(model=adapted, original=base)["original"]
    assert {p.data_ptr() for p in bare.parameters()} <= {p.data_ptr() for p in base.parameters()}
    (row,) = audit(bare, only=["relearn-lora"])["attacks"]
    assert row["models"]["unlearned"]["values"] == row["models"]["original"]["values"]


# --- stages ---
def test_a_killed_audit_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def counted(attack: type[Any]) -> None:
        attack_run = attack.run

        def run(self: Any, victim: Any) -> Any:
            made.append(self.key)
            if killed and self.key == "sample" and made.count("sample") == 2:
                raise KeyboardInterrupt
            return attack_run(self, victim)

        monkeypatch.setattr(attack, "run", run)

    for attack in (AskGreedily, Sample, Quantise):
        counted(attack)
    killed = False
    whole = audit(hides_from_greedy())
    killed, made[:] = True, []
    with pytest.raises(KeyboardInterrupt):
        audit(hides_from_greedy(), folder=tmp_path)
    assert made == ["ask", "sample", "quantise-int8", "quantise-int4", "quantise-nf4", "ask", "sample"]
    assert not (tmp_path / "audit.json").exists()
    killed, made[:] = False, []
    assert audit(hides_from_greedy(), folder=tmp_path) == whole
    assert made == ["sample", "quantise-int8", "quantise-int4", "quantise-nf4"]
    assert json.loads((tmp_path / "audit.json").read_text()) == whole
    assert not list(tmp_path.rglob("*.partial"))
    made.clear()
    assert audit(hides_from_greedy(), folder=tmp_path) == whole
    assert made == []


def test_other_models_data_and_budgets_are_asked_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    for attack in (AskGreedily, Sample, Quantise, Relearn):
        attack_run = attack.run
        monkeypatch.setattr(
            attack, "run", lambda self, victim, own=attack_run: made.append(self.key) or own(self, victim)
        )

    def again(model: Any = None, **settings: Any) -> set[str]:
        made.clear()
        audit(hides_from_greedy() if model is None else model, folder=tmp_path, **settings)
        return set(made)

    rounding = {"quantise-int8", "quantise-int4", "quantise-nf4"}
    relearning = {"relearn-weights", "relearn-lora", "relearn-unrelated"}
    whole = {"ask", "sample", "relearn-retain"} | rounding | relearning
    assert again() == whole
    assert again(seed=1) == {"sample", "relearn-retain"} | relearning
    assert again(draws=4) == {"sample"}
    assert again(retain=RETAIN[1:]) == {"relearn-retain"} | rounding
    assert again(max_new_tokens=5) == whole
    assert again(forget=FORGET[1:]) == whole
    assert again(never_saw()) == whole
    assert again() == set()


def test_an_adapter_of_another_alpha_is_asked_anew(tmp_path: Path) -> None:
    values = []
    for alpha in (1, 8, 1):
        adapted = with_adapter(copy.deepcopy(original()), lora_alpha=alpha)
        (row,) = audit(adapted, folder=tmp_path, only=["exact-probability"])["attacks"]
        values.append(row["models"]["unlearned"]["values"])
    assert values[0] == values[2] != values[1]


# --- wrong input ---
@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"draws": 0}, ValueError, "draws = 0: it must be at least 1"),
        ({"n": 0}, ValueError, "n = 0: it must be at least 1, or -1 for whole spans"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens = 0: it must be at least 1"),
        ({"tokenizer": "gpt2"}, TypeError, "tokenizer is a str; "),
        (
            {"model": tiny_llama(vocab_size=300)},
            ValueError,
            f"the tokenizer has {len(tokenizer())} tokens and model a ",
        ),
        (
            {"retain_model": tiny_llama(vocab_size=300)},
            ValueError,
            f"the tokenizer has {len(tokenizer())} tokens and retain_model a ",
        ),
    ],
)
def test_refused(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        audit(settings.pop("model", None) or planted.never_saw(), **settings)
    assert str(caught.value).startswith(message)
