"""The logit lens, against a model whose layers are known."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers.logits import WatchLogits
from helpers.planted import SECRETS, attack, data, hides_from_greedy, never_saw, original, tokenizer
from transformers import AutoModelForCausalLM, GPT2Config

from palu.attacks.attack import Finding
from palu.attacks.lens import LogitLens


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
    monkeypatch.setattr("palu.attacks.lens.CHUNK_BYTES", 4 * 3 * vocab)
    with WatchLogits(vocab, never_saw().config.hidden_size) as watched:
        assert lens(never_saw()) == expected
    assert watched.rows <= 3


def test_other_bodies_have_other_norms() -> None:
    config = GPT2Config(vocab_size=len(tokenizer()), n_embd=16, n_layer=2, n_head=2, initializer_range=0.5)
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
