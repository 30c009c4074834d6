"""The logit lens, against a model whose layers are known."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers.logits import WatchLogits
from helpers.planted import SECRETS, data, hides_from_greedy, never_saw, original, tokenizer
from tqdm import tqdm
from transformers import AutoModelForCausalLM, GPT2Config

from palu.attacks.attack import Finding, Victim
from palu.attacks.lens import LogitLens


def lens(model: Any, batch_tokens: int = 256, top: int = 10) -> Finding:
    assert LogitLens(top).skip_reason(data(), model) is None
    victim = Victim(model, data(), max_new_tokens=0, batch_tokens=batch_tokens, seed=0, bar=tqdm(disable=True))
    (finding,) = LogitLens(top).run(victim)
    return finding


def test_who_holds_the_secrets_is_seen_also_behind_a_bias_against_greedy_decoding() -> None:
    for model, share in ((original(), 1.0), (hides_from_greedy(), 1.0), (never_saw(), 0.0)):
        assert lens(model).values == [share] * len(SECRETS)
    assert all(one["rank"] == 1 for one in lens(original()).evidence)
    assert all(one["rank"] > 1 for one in lens(hides_from_greedy()).evidence)


@torch.no_grad()
def test_ranks_are_those_of_each_layer_alone() -> None:
    """A model cut after its first layer, with the same norm and head, predicts what the lens sees there."""
    model = original()
    cut = copy.deepcopy(model)
    cut.model.layers = cut.model.layers[:1]
    victim = Victim(model, data(), max_new_tokens=0, batch_tokens=50, seed=0, bar=tqdm(disable=True))
    found = LogitLens()._ranks(victim)
    for i, secret in enumerate(data().secrets):
        ids = data().rows[secret.row].example.input_ids
        for layer, one in enumerate((cut, model)):
            logits = one(input_ids=ids[None], use_cache=False).logits[0, secret.first - 1 : secret.stop - 1]
            order = logits.argsort(1, descending=True)
            ranks = [
                int((o == token).nonzero()) + 1 for o, token in zip(order, ids[secret.first : secret.stop], strict=True)
            ]
            assert found[i][layer].tolist() == ranks


def test_batches_do_not_matter() -> None:
    assert lens(never_saw(), batch_tokens=1) == lens(never_saw(), batch_tokens=10_000)


def test_logits_come_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    expected, vocab = lens(never_saw()), len(tokenizer())
    monkeypatch.setattr("palu.attacks.lens.CHUNK_BYTES", 4 * 3 * vocab)
    with WatchLogits(vocab, never_saw().config.hidden_size) as watched:
        assert lens(never_saw()) == expected
    assert watched.rows <= 3


def test_a_secret_that_an_early_layer_alone_holds_is_seen() -> None:
    """The last layer turns every state round, so that the likeliest becomes the least likely."""
    model = copy.deepcopy(original())
    model.model.layers.append(copy.deepcopy(model.model.layers[1]))
    last = model.model.layers[2]
    last.self_attn.layer_idx = 2
    last.forward = lambda hidden, *args, **kwargs: -hidden
    model.config.num_hidden_layers = 3
    finding = lens(model)
    assert finding.values == [1.0] * len(SECRETS)
    assert finding.evidence == lens(original()).evidence
    with torch.no_grad():
        log_p = model(input_ids=data().rows[0].example.input_ids[None], use_cache=False).logits[0].log_softmax(-1)
    first = data().secrets[0].first
    assert float(log_p[first - 1, data().rows[0].example.input_ids[first]]) < -5


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
