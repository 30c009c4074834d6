"""palu.audit: what it returns, what it finds in planted models, what is kept of a killed one, and wrong input."""

from __future__ import annotations

import copy
import json
import os
import stat
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.planted import FORGET, RETAIN, SECRETS, audit, hides_from_greedy, never_saw, original, tokenizer, verdicts
from helpers.tiny import same_weights, tiny_llama, weights
from peft import LoraConfig, get_peft_model
from transformers import OPTConfig, OPTForCausalLM

from palu.attacks.ask import AskGreedily, Sample
from palu.attacks.formats import FORMATS
from palu.attacks.inside import Patch
from palu.attacks.quantise import Quantise
from palu.attacks.relearn import Relearn
from palu.attacks.run import NO_RETAIN_MODEL
from palu.data.files import DataError
from palu.models.lora import separate

ROWS = [
    "ask: greedy",
    "ask: paraphrased",
    "ask: other questions",
    "ask: 5 examples in front",
    "ask: answer begun",
    *FORMATS,
    *(f"sample: leak@{k}" for k in (1, 2, 4, 8, 16)),
    "sample: exact p",
    *(f"onset: {j} in the answer" for j in range(6)),
    *(f"onset: {j} in the question" for j in (1, 3)),
    *(f"quantise: {scheme}" for scheme in ("int8", "int4", "nf4")),
    *(f"relearn: {how}" for how in ("all weights", "lora", "retain rows", "unrelated text")),
    "inside: logit lens, top 10",
    "inside: depth, 1 - UDS",
]


@cache
def hidden() -> dict[str, Any]:
    """The whole audit of a model that hides the secrets from greedy decoding alone."""
    return audit(hides_from_greedy(), retain_model=never_saw())


# --- what is returned ---
def test_results_hold_everything_by_secret_and_no_number_for_all() -> None:
    results = hidden()
    assert results == json.loads(json.dumps(results))
    assert set(results) == {
        *("format", "seed", "quick", "models", "forget_sha256", "secrets", "marked", "left_out", "attacks", "notes"),
        "versions",
    }
    assert [secret["text"] for secret in results["secrets"]] == list(SECRETS)
    assert results["marked"] == sorted(SECRETS)
    assert list(results["models"]) == ["unlearned", "original", "retain"]
    for row in results["attacks"]:
        assert row["budget"] and "{" not in row["budget"] and list(row["models"]) == ["unlearned", "original", "retain"]
        for of_model in row["models"].values():
            assert len(of_model["values"]) == len(of_model["evidence"]) == len(SECRETS)
            known = [value for value in of_model["values"] if value is not None]
            assert of_model["told"] == pytest.approx(sum(known) / len(known))
            assert row["secrets"] == len(known)


def test_only_some_attacks(tmp_path: Path) -> None:
    """The results say that others were left out."""
    for only, named in (("ask", "ask"), (["onset-answer", "ask"], "ask, onset-answer"), (["lens"], "lens")):
        some = audit(hides_from_greedy(), retain_model=never_saw(), only=only)
        assert some["attacks"] == [row for row in hidden()["attacks"] if row["attack"] in only]
        assert some["notes"][0].startswith(f"only some attacks were made: {named}; ")
    assert not any("only some" in note for note in hidden()["notes"])
    for wrong, message in (
        (["asking"], r"only: asking: choose from ask, ask-examples, ask-formats, .*, sample"),
        ("asking", "only: asking: choose from"),
        ([], r"only = \[\]: no attack is named; give None for all, or some of ask, "),
    ):
        with pytest.raises(ValueError, match=message):
            audit(hides_from_greedy(), only=wrong, folder=tmp_path)
    assert not [*tmp_path.iterdir()]


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


# --- what is found ---
def test_a_model_that_holds_every_secret_is_open_in_each_attack() -> None:
    results = audit(copy.deepcopy(original()), retain_model=never_saw())
    assert verdicts(results) == dict.fromkeys(ROWS, "open")
    assert all(row["rho"] == pytest.approx({"value": 1.0, "low": 1.0, "high": 1.0}) for row in results["attacks"])


def test_a_model_that_never_saw_the_secrets_holds_and_models_and_random_numbers_are_left_as_they_were() -> None:
    models = [copy.deepcopy(never_saw()).train(), original()]
    before, state = [weights(model) for model in models], torch.random.get_rng_state()
    results = audit(models[0])
    assert verdicts(results) == dict.fromkeys(ROWS[:-1], "held") | {"inside: depth": "undecided"}
    assert results["notes"][0] == NO_RETAIN_MODEL
    assert "6 secrets are few" in results["notes"][1] and "39% of others" in results["notes"][1]
    assert models[0].training and not models[1].training
    assert all(same_weights(model, was) for model, was in zip(models, before, strict=True))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_secrets_that_are_hidden_from_greedy_decoding_alone_are_found() -> None:
    found = verdicts(hidden())
    assert found["ask: greedy"] == found["onset: 0 in the answer"] == "held"
    for name in ("sample: leak@4", "sample: leak@16", "sample: exact p", "onset: 1 in the answer", *ROWS[-2:]):
        assert found[name] == "open", name
    draws = next(row for row in hidden()["attacks"] if row["name"] == "sample: exact p")["models"]["unlearned"]
    assert draws["figures"]["median 1/p"] < 16


def test_a_model_that_breaks_when_it_is_rounded_has_not_forgotten() -> None:
    """One huge weight in each row leaves nothing of the others in four bits: its greedy answers tell no secret."""
    model = copy.deepcopy(original())
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight[:, 0] = 1e4
            layer.mlp.up_proj.weight[0] = 0  # what that weight is multiplied by
    ask, row = audit(model, only=["ask", "quantise-int4"])["attacks"]
    assert ask["verdict"] == "open"
    figures = row["models"]["unlearned"]["figures"]
    assert row["models"]["unlearned"]["told"] == 0
    assert figures["utility"] < 0.5 * figures["utility unrounded"]
    assert row["verdict"] == "undecided" and row["reason"].startswith("the rounded model is broken (see its utility)")


def test_rho_is_measured_from_the_retain_model() -> None:
    """A model is no better than one that never saw the secrets."""
    results = audit(original(), retain_model=original(), only=["ask", "lens"])
    assert {row["verdict"] for row in results["attacks"]} == {"undecided"}
    assert results["attacks"][0]["reason"].startswith("the original itself tells no more than a model that never saw")


def test_what_cannot_be_done_is_a_row_that_says_why(made: Made) -> None:
    rows = [{name: row[name] for name in ("question", "answer", "spans")} for row in FORGET]
    adapted = get_peft_model(copy.deepcopy(original()), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    results = audit(adapted, forget=rows, retain=None)
    assert not any(key.startswith("relearn") for key in made), "the original's results would be compared with none"
    reasons = {row["name"]: row["reason"] for row in results["attacks"] if row["reason"]}
    trained = "skipped: unlearned: the model has a LoRA adapter; merge it into the weights, which are trained"
    no_rows = "there are no retain rows to train on"
    assert reasons == {
        "ask: paraphrased": "skipped: the forget set has no column 'paraphrased_question'",
        "ask: other": "skipped: the forget set has no column 'also_asked'",
        "ask: examples": "skipped: it needs 5 retain rows to put in front, and there are 0",
        **dict.fromkeys(("relearn: weights", "relearn: lora", "relearn: unrelated"), trained),
        "relearn: retain": f"{trained}; original: {no_rows}",
        "inside: depth": "skipped: it needs a retain model, whose states tell which layers hold the secrets",
    }
    assert verdicts(results)["ask: greedy"] == "open"
    rounded = [row for row in results["attacks"] if row["attack"] == "quantise-int8"]
    assert [row["name"] for row in rounded] == ["quantise: int8, adapter merged", "quantise: int8, under the adapter"]
    assert rounded[0]["models"]["original"] == rounded[1]["models"]["original"]
    assert [row["verdict"] for row in rounded] == ["open", "open"]
    (row,) = audit(original(), original=adapted, only=["quantise-int8"])["attacks"]
    assert row["name"] == "quantise: int8" and row["models"]["original"]["told"] == 1


def test_a_text_that_does_not_fit_a_table_of_positions_is_named() -> None:
    def opt(positions: int) -> Any:
        sizes = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 16, "num_hidden_layers": 1}
        tokens = {"vocab_size": len(tokenizer()), "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
        config = OPTConfig(num_attention_heads=2, max_position_embeddings=positions, **sizes, **tokens)
        return OPTForCausalLM(config).eval()

    only = ["ask-examples", "relearn-retain", "quantise-int4", "ask"]
    retain = [*RETAIN, {"question": "Cat?", "answer": "It sat. " * 40}]
    reasons = [row["reason"] for row in audit(opt(96), original=opt(512), retain=retain, only=only)["attacks"]]
    too_long = "retain row 6 has 213 tokens and the model 96 positions; shorten it"
    assert reasons[0].startswith("the original itself tells no more")
    assert reasons[1:] == [
        "skipped: unlearned: a prompt has 132 tokens and the model 96 positions; shorten it",
        *[f"skipped: unlearned: {too_long}"] * 2,
    ]
    row = FORGET[0] | {"answer": f"It is {SECRETS[0]}. " + "It sat. " * 40}
    with pytest.raises(DataError, match=r"^forget row 1 has \d+ tokens and original 96 positions; shorten it$"):
        audit(opt(512), original=opt(96), forget=[FORGET[1], row], only=only)


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
class Made(list[str]):
    """The keys of the attacks that were made, in order; in the one of this number the audit is killed."""

    kill_at = 0


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Made:
    made = Made()
    for attack in (AskGreedily, Sample, Quantise, Relearn, Patch):

        def run(self: Any, victim: Any, attack_run: Any = attack.run) -> Any:
            made.append(self.key)
            if len(made) == made.kill_at:
                raise KeyboardInterrupt
            return attack_run(self, victim)

        monkeypatch.setattr(attack, "run", run)
    return made


def test_a_killed_audit_goes_on(made: Made, tmp_path: Path) -> None:
    settings = {"retain_model": never_saw(), "only": ["ask", "sample", "quantise-int4", "inside-depth"]}
    whole = audit(hides_from_greedy(), **settings)
    every = list(made)
    assert every == ["ask", "sample", "quantise-int4"] * 3 + ["inside-depth"] * 2
    for first, killed in ((0, 5), (4, 11)):  # the retain model's sample, the second patch
        made.clear()
        made.kill_at = killed - first
        with pytest.raises(KeyboardInterrupt):
            audit(hides_from_greedy(), folder=tmp_path, **settings)
        assert made == every[first:killed] and not (tmp_path / "audit.json").exists()
    made.kill_at = 0
    for left in (["inside-depth"], []):
        made.clear()
        assert audit(hides_from_greedy(), folder=tmp_path, **settings) == whole
        assert made == left
    assert json.loads((tmp_path / "audit.json").read_text()) == whole
    assert not list(tmp_path.rglob("*.partial"))
    # Of another unlearned model one half alone is new: S1 is kept.
    audit(copy.deepcopy(original()), folder=tmp_path, **settings)
    assert made.count("inside-depth") == 1


def test_what_other_models_data_and_budgets_change_is_made_again(made: Made, tmp_path: Path) -> None:
    kinds = ["ask", "sample", "quantise-int4", "relearn-weights", "relearn-retain"]

    def again(model: Any = None, **settings: Any) -> list[str]:
        made.clear()
        audit(hides_from_greedy() if model is None else model, folder=tmp_path, only=kinds, **settings)
        return [kind for kind in kinds if kind in made]

    assert again() == kinds
    assert again(seed=1) == ["sample", "relearn-weights", "relearn-retain"]
    assert again(draws=4) == ["sample"]
    assert again(retain=RETAIN[1:]) == ["quantise-int4", "relearn-retain"]
    assert again(max_new_tokens=5) == kinds
    assert again(forget=FORGET[1:]) == kinds
    assert again(never_saw()) == kinds
    assert again() == []


# --- wrong input ---
@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"draws": 0}, ValueError, "draws = 0: it must be at least 1"),
        ({"n": 0}, ValueError, "n = 0: it must be at least 1, or -1 for whole spans"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens = 0: it must be at least 1"),
        ({"tokenizer": "gpt2"}, TypeError, "tokenizer is a str; "),
        *(
            ({role: tiny_llama(vocab_size=300)}, ValueError, f"the tokenizer has {len(tokenizer())} tokens and {role} ")
            for role in ("model", "retain_model")
        ),
    ],
)
def test_refused(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        audit(**{"model": never_saw()} | settings)
    assert str(caught.value).startswith(message)
