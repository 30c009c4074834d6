"""The logit lens and the depth score, against plain passes and hooks, and models whose states are known."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers.logits import WatchLogits
from helpers.planted import SECRETS, attack, audit, data, hides_from_greedy, never_saw, original, refuses, tokenizer
from helpers.tiny import tiny_llama
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3nTextConfig

from palu.attacks.attack import Finding
from palu.attacks.inside import LogitLens, Patch, depth_score, states_of

TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


# --- the logit lens ---
def lens(model: Any, top: int = 10) -> Finding:
    (finding,) = attack(LogitLens(top), model)
    return finding


def test_who_holds_the_secrets_is_seen_also_behind_a_bias_against_greedy_decoding() -> None:
    for model, share in ((original(), 1.0), (hides_from_greedy(), 1.0), (never_saw(), 0.0)):
        assert lens(model).values == [share] * len(SECRETS)
    assert all(one["rank"] == 1 for one in lens(original()).evidence)
    assert all(one["rank"] > 1 for one in lens(hides_from_greedy()).evidence)


@torch.no_grad()
def test_ranks_are_those_of_each_layer_alone_and_the_best_layer_counts() -> None:
    """A model cut after its first layer, with the same norm and head, predicts what the lens sees there."""
    model = never_saw()
    cut = copy.deepcopy(model)
    cut.model.layers = cut.model.layers[:1]
    worst = []  # rank of a secret's tokens at each layer
    for secret in data().secrets:
        ids, at = data().rows[secret.row].example.input_ids, slice(secret.first - 1, secret.stop - 1)
        logits = [one(input_ids=ids[None], use_cache=False).logits[0, at] for one in (cut, model)]
        tokens = ids[secret.first : secret.stop, None]
        worst.append([int((one >= one.gather(1, tokens)).sum(1).max()) for one in logits])
    best = [min(ranks) for ranks in worst]
    finding = lens(model, top=sorted(best)[2])
    assert finding.evidence == [
        {"layer": 1 + ranks.index(rank), "rank": rank} for ranks, rank in zip(worst, best, strict=True)
    ]
    assert finding.values == [float(rank <= sorted(best)[2]) for rank in best]
    assert {one["layer"] for one in finding.evidence} == {1, 2}


def test_logits_come_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    expected, vocab = lens(never_saw()), len(tokenizer())
    monkeypatch.setattr("palu.attacks.inside.CHUNK_BYTES", 4 * 3 * vocab)
    with WatchLogits(vocab, never_saw().config.hidden_size) as watched:
        assert lens(never_saw()) == expected
    assert watched.rows <= 3


def test_other_bodies_have_other_norms() -> None:
    config = AutoConfig.for_model(
        "gpt2", vocab_size=len(tokenizer()), n_embd=16, n_layer=2, n_head=2, initializer_range=0.5
    )
    model = AutoModelForCausalLM.from_config(config)
    assert all(1 <= one["layer"] <= 2 and one["rank"] >= 1 for one in lens(model).evidence)


def test_a_body_without_a_known_norm_is_refused() -> None:
    model = copy.deepcopy(original())
    model.model.last = model.model.norm
    del model.model.norm
    assert LogitLens().skip_reason(data(), model) == (
        "LlamaModel has no norm after its last layer that is called norm, final_layernorm, ln_f, final_layer_norm or "
        "norm_f"
    )


# --- the drops ---
def drops(target: Any, source: Any, batch_tokens: int = 256) -> torch.Tensor:
    """Of each secret and layer: [secrets, layers]."""
    states = states_of(source, data(), batch_tokens=batch_tokens, progress=False)
    (finding,) = attack(Patch("its fingerprint", states), target, batch_tokens=batch_tokens)
    return torch.tensor([one["drops"] for one in finding.evidence], dtype=torch.float64)


def first_of(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def by_hand(target: Any, source: Any, layers: str) -> torch.Tensor:
    """The same by one pass of the whole text for each secret and each layer, without keys and values kept."""
    found = []
    for secret in data().secrets:
        ids = data().rows[secret.row].example.input_ids
        at = slice(secret.first - 1, secret.stop - 1)

        def mean(ids: torch.Tensor = ids, at: slice = at) -> float:
            log_p = target(input_ids=ids[None], use_cache=False).logits[0, at].double().log_softmax(-1)
            return float(log_p.gather(1, ids[at.start + 1 : at.stop + 1, None]).mean())

        before, after = mean(), []
        for theirs, own in zip(source.get_submodule(layers), target.get_submodule(layers), strict=True):
            kept: list[torch.Tensor] = []
            hook = theirs.register_forward_hook(lambda m, given, output, kept=kept: kept.append(first_of(output)))
            source(input_ids=ids[None], use_cache=False)
            hook.remove()

            def put(m: nn.Module, given: Any, output: Any, kept: Any = kept, at: slice = at) -> None:
                first_of(output)[0, at] = kept[0][0, at]  # in place

            hook = own.register_forward_hook(put)
            after.append(mean())
            hook.remove()
        found.append([before - one for one in after])
    return torch.tensor(found, dtype=torch.float64)


def depth_row(model: Any, **settings: Any) -> dict[str, Any]:
    (row,) = audit(model, only=["inside-depth"], **settings)["attacks"]
    return row


def test_drops_are_those_of_plain_hooks_also_where_a_layer_gives_a_tuple() -> None:
    models = [tiny_llama(seed=seed, dtype=torch.float64, vocab_size=len(tokenizer())) for seed in (0, 1)]
    expected = by_hand(*models, "model.layers")
    assert expected.abs().min() > 1e-3
    found = drops(*models)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    for model in models:
        for layer in model.model.layers:
            layer.register_forward_hook(lambda module, given, output: (output, None))
        # What transformers does with a tuple's first member.
        for layer in (model.model.layers[1], model.model.norm):
            layer.register_forward_pre_hook(lambda module, given: (first_of(given[0]), *given[1:]))
    assert torch.equal(drops(*models), found)


@pytest.mark.parametrize(
    ("kind", "layers", "settings"),
    [
        ("gpt2", "transformer.h", {"n_embd": 32, "n_layer": 3, "n_head": 4}),
        ("gemma2", "model.layers", {**TINY, "head_dim": 8, "sliding_window": 8}),
        ("opt", "model.decoder.layers", {**TINY, "ffn_dim": 48, "word_embed_proj_dim": 32}),
        ("gpt_neox", "gpt_neox.layers", TINY),
    ],
)
def test_other_kinds_of_models(kind: str, layers: str, settings: dict[str, Any]) -> None:
    config = AutoConfig.for_model(kind, vocab_size=len(tokenizer()), initializer_range=0.3, **settings)
    models = [AutoModelForCausalLM.from_config(config).eval() for _ in range(2)]
    torch.testing.assert_close(drops(*models), by_hand(*models, layers), rtol=1e-4, atol=1e-5)


def test_how_layers_are_batched_does_not_matter() -> None:
    whole = drops(original(), never_saw())
    torch.testing.assert_close(drops(original(), never_saw(), batch_tokens=1), whole, rtol=1e-4, atol=1e-5)


def test_bfloat16_states_are_those_of_float32_up_to_rounding_and_a_models_own_change_nothing() -> None:
    models = [copy.deepcopy(model).bfloat16() for model in (original(), never_saw())]
    exact = drops(original(), never_saw())
    assert (drops(*models) - exact).norm() < 0.05 * exact.norm()
    assert drops(models[0], copy.deepcopy(models[0])).abs().max() == 0
    mixed = drops(original(), models[1])
    assert (mixed - exact).norm() < 0.05 * exact.norm()


# --- the score ---
def test_score_of_drops() -> None:
    assert depth_score([0.05, 1.0, 3.0], [9.0, 0.5, 6.0]) == pytest.approx((0.5 + 3) / 4)
    assert depth_score([2.0], [-1.0]) == 0
    assert depth_score([0.05, -2.0], [1.0, 1.0]) is None


def test_planted_models() -> None:
    for model, uds, verdict in (
        (copy.deepcopy(original()), 0.0, "open"),
        (hides_from_greedy(), 0.0, "open"),  # by its head alone
        (never_saw(), 1.0, "held"),
    ):
        row = depth_row(model, retain_model=never_saw())
        assert (row["name"], row["verdict"], row["secrets"]) == ("inside: depth, 1 - UDS", verdict, len(SECRETS))
        assert list(row["models"]) == ["unlearned", "original", "retain"]
        assert row["rho"]["value"] == pytest.approx(1 - uds, abs=1e-6)
        assert row["models"]["unlearned"]["figures"]["UDS"] == pytest.approx(uds, abs=1e-6)
        assert row["models"]["original"]["told"] == 1 and row["models"]["retain"]["told"] == 0
        for ours, retain in zip(*(row["models"][role]["evidence"] for role in ("unlearned", "retain")), strict=True):
            assert ours["UDS"] == depth_score(retain["S1"], ours["S2"])
            assert len(ours["S2"]) == 2


def test_refusing_is_not_forgetting() -> None:
    row = depth_row(refuses(), retain_model=never_saw())
    assert row["verdict"] == "open"
    assert 0 < row["models"]["unlearned"]["figures"]["UDS"] < 0.5


def test_an_adapter_that_is_not_merged_counts() -> None:
    adapted = get_peft_model(copy.deepcopy(original()), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    assert depth_row(adapted, retain_model=never_saw())["models"]["unlearned"]["figures"]["UDS"] < 1e-6
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    assert depth_row(adapted, retain_model=never_saw())["models"]["unlearned"]["figures"]["UDS"] > 0.1


# --- what cannot be done is told ---
def test_it_needs_a_retain_model_that_does_not_know_the_secrets() -> None:
    row = depth_row(hides_from_greedy(), retain_model=original())
    assert (row["name"], row["verdict"], row["models"]) == ("inside: depth", "undecided", {})
    assert row["reason"] == (
        "skipped: no secret has a layer with S1 > 0.05: the retain model's states tell them as well"
    )


def test_models_of_another_shape_are_skipped() -> None:
    other = tiny_llama(vocab_size=len(tokenizer()), num_hidden_layers=3)
    reason = "3 layers of width 32 do not fit into the original's 2 of width 64"
    assert depth_row(other, retain_model=never_saw())["reason"] == f"skipped: unlearned: {reason}"
    assert depth_row(other, retain_model=other)["reason"] == f"skipped: {reason}"


def test_bodies_whose_layers_cannot_be_told_are_refused() -> None:
    config = Gemma3nTextConfig(
        **TINY,
        vocab_size=len(tokenizer()),
        head_dim=8,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=len(tokenizer()),
        num_kv_shared_layers=0,
        laurel_rank=4,
    )
    refused = {
        # Two lists of three modules: the layers, and what makes three more streams of each state.
        4: "Gemma3nTextModel has no one list of as many layers as its configuration says (num_hidden_layers)",
        3: "the layers of Gemma3nTextModel do not each give one state of the same width for each token",
    }
    for config.altup_num_inputs, reason in refused.items():
        model = AutoModelForCausalLM.from_config(config)
        assert states_of(model, data(), batch_tokens=256, progress=False) == reason
