"""Relearning: what a few steps of training bring back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers.logits import WatchLogits
from helpers.planted import FORGET, RETAIN, SECRETS, attack, data, never_saw, original, refuses, tokenizer
from helpers.tiny import same_weights, weights
from torch.nn.utils.rnn import pad_sequence

from palu.attacks.ask import AskGreedily
from palu.attacks.attack import Finding
from palu.attacks.relearn import Relearn, _loss, unrelated_texts
from palu.attacks.secrets import AuditData
from palu.evaluate.scores import raw_examples

TOKENS = 24
RATES = {"weights": 1e-3, "lora": 5e-3}


def relearn(model: Any, of: AuditData | None = None, **settings: Any) -> Finding:
    given: dict[str, Any] = {
        "max_new_tokens": TOKENS,
        "trained": "weights",
        "rows": "forget",
        "steps": 8,
        "every": 4,
        "learning_rate": 1e-3,
        "seed": 0,
    }
    (finding,) = attack(Relearn(**given | settings), model, of)
    return finding


@pytest.mark.parametrize("trained", RATES)
def test_a_model_that_only_refuses_tells_again_what_it_was_not_trained_on(trained: str) -> None:
    """And stays as it was; bfloat16 weights are trained in float32, or small steps would be rounded away."""
    (asked,) = attack(AskGreedily(TOKENS), refuses())
    assert asked.values == [0.0] * len(SECRETS)
    settings: dict[str, Any] = {"trained": trained, "learning_rate": RATES[trained]}
    model, rounded = refuses(), copy.deepcopy(refuses()).bfloat16()
    before, modules = weights(model), [type(module) for module in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    finding = relearn(model, **settings)
    for found in (finding, relearn(rounded, **settings)):
        assert found.values.count(None) == 1 and found.values.count(1.0) >= 4
    assert rounded.dtype == torch.bfloat16
    assert same_weights(model, before) and [type(module) for module in model.modules()] == modules
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert relearn(model, **settings) == finding
    assert relearn(never_saw(), **settings).values.count(1.0) == 0


def test_the_step_after_which_most_is_told_counts() -> None:
    """At 0.1 a step breaks the model, and at 0 none does anything."""
    for rate in (0.1, 0.0):
        finding = relearn(original(), steps=6, every=2, learning_rate=rate)
        answers = [(i, texts) for i, texts in enumerate(finding.evidence) if texts is not None]
        told = [sum(SECRETS[i] in texts[step] for i, texts in answers) for step in range(3)]
        assert sum(value or 0 for value in finding.values) == max(told)
        assert finding.figures["step"] == 2 * (1 + told.index(max(told)))
    assert finding.values.count(1.0) == 5 and finding.figures["step"] == 2


def test_retain_rows_may_be_trained_on() -> None:
    finding = relearn(refuses(), rows="retain")
    assert finding.name == "relearn: retain rows" and None not in finding.values
    assert relearn(original(), rows="retain", steps=1, every=1).values == [1.0] * 6
    of = AuditData(FORGET, [*RETAIN, {"question": "Who?", "answer": SECRETS[2]}], tokenizer())
    assert [value is None for value in relearn(refuses(), of, rows="retain").values] == [i == 2 for i in range(6)]
    # One step trains on the first four rows, so the last one teaches nothing.
    assert None not in relearn(refuses(), of, rows="retain", steps=1, every=1).values


def test_unrelated_text_may_be_trained_on() -> None:
    """Nobody needs rows for it; a weak lesson leaves what the model holds, and teaches no secret."""
    of = AuditData(FORGET, None, tokenizer())
    told = relearn(original(), of, rows="unrelated", steps=1, every=1, learning_rate=1e-5)
    assert told.name == "relearn: unrelated text" and told.values == [1.0] * 6
    never = relearn(never_saw(), of, rows="unrelated", steps=4, every=2)
    assert never.values == [0.0] * 6
    texts = unrelated_texts()
    assert len(texts) == len(set(texts)) >= 24 and all(text == text.strip() != "" for text in texts)
    lessons = raw_examples(texts, tokenizer(), "unrelated", max_length=100)
    assert all((one.labels[1:] == one.input_ids[1:]).all() and one.labels[0] == -100 for one in lessons)


def test_secrets_of_rows_that_are_trained_on_do_not_count() -> None:
    """Nor do those that such a row tells; the same rows are chosen for each model."""
    rows = [*FORGET, {"question": "Again?", "answer": f"Not {SECRETS[3]}, {SECRETS[0]}.", "spans": [[4, 14]]}]
    of = AuditData(rows, None, tokenizer())
    one, other = relearn(never_saw(), of, steps=1), relearn(original(), of, steps=1)
    assert [value is None for value in one.values] == [value is None for value in other.values]
    for seed in range(8):
        examples, asked = Relearn(TOKENS, "weights", "forget", 1, 1, 1e-3, seed)._lesson(of)
        trained = [example.row for example in examples]
        answers = " ".join(of.rows[i].answer for i in trained)
        assert asked == [
            i for i, secret in enumerate(of.secrets) if secret.row not in trained and secret.text not in answers
        ]


def test_the_loss_is_the_models_own_and_its_logits_come_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    model, examples, vocab = refuses(), [row.example for row in data().rows[:4]], len(tokenizer())
    ids, labels = (pad_sequence([getattr(e, name) for e in examples], True, -100) for name in ("input_ids", "labels"))
    expected = model(input_ids=ids.clamp(min=0), attention_mask=(ids >= 0).long(), labels=labels, use_cache=False).loss
    monkeypatch.setattr("palu.attacks.relearn.CHUNK_BYTES", 4 * 3 * vocab)
    with WatchLogits(vocab, model.config.hidden_size) as watched:
        loss = _loss(model, examples)
        gradient = torch.autograd.grad(loss, model.model.norm.weight)[0]
    assert watched.rows <= 3
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    assert torch.allclose(gradient, torch.autograd.grad(expected, model.model.norm.weight)[0], rtol=1e-4, atol=1e-7)


def test_what_it_lacks_is_said() -> None:
    def skip_reason(of: AuditData, trained: Any) -> str | None:
        return Relearn(TOKENS, trained, "forget", 1, 1, 1e-3, 0).skip_reason(of, original())

    assert skip_reason(AuditData(FORGET[:1], None, tokenizer()), "weights") == (
        "no secret is left to ask for that the texts trained on do not tell; give more forget rows"
    )
    assert skip_reason(data(), "weights") is None
