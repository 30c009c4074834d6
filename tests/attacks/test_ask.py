"""Each way to ask, against what the model's logits say."""

from __future__ import annotations

from itertools import combinations, product
from typing import Any

import pytest
import torch
from helpers.planted import FORGET, RETAIN, SECRETS, attack, data, hides_from_greedy, never_saw, original, tokenizer
from helpers.planted import victim as attacked
from helpers.tiny import tiny_llama
from tqdm import tqdm

from palu.attacks.ask import (
    PREFIX,
    AskAfterExamples,
    AskGreedily,
    AskOtherQuestions,
    AskWithPrefix,
    ExactProbability,
    OnsetInAnswer,
    OnsetInQuestion,
    Sample,
    leak_at_k,
)
from palu.attacks.attack import Attack
from palu.attacks.secrets import AuditData
from palu.data.paraphrases import ALSO_ASKED, PARAPHRASES
from palu.models.generation import eval_mode, generate_ids

TOKENS = 24
COLUMNS = (PARAPHRASES, ALSO_ASKED)


# --- greedily ---
@pytest.mark.parametrize(
    "ask",
    [
        *(AskGreedily(TOKENS), AskAfterExamples(TOKENS), AskWithPrefix(TOKENS)),
        *(AskOtherQuestions(TOKENS, column) for column in COLUMNS),
    ],
    ids=lambda ask: ask.key,
)
def test_every_way_to_ask_tells_who_holds_the_secrets(ask: Attack) -> None:
    for model, share in ((original(), 1.0), (never_saw(), 0.0)):
        (finding,) = attack(ask, model)
        assert finding.values == [share] * len(SECRETS)
    (finding,) = attack(ask, original())
    written = [[row["answer"]] if isinstance(ask, AskOtherQuestions) else row["answer"] for row in FORGET]
    assert finding.evidence == written


@pytest.mark.parametrize("column", COLUMNS)
def test_a_question_that_tells_the_secret_does_not_count(column: str) -> None:
    own = FORGET[0][column]
    for questions, value in (([f"Is it {SECRETS[0]}?"], None), ([f"Is it {SECRETS[0]}?", own], 1.0), ([], None)):
        of = AuditData([FORGET[0] | {column: questions}, *FORGET[1:]], RETAIN, tokenizer())
        (finding,) = attack(AskOtherQuestions(TOKENS, column), original(), of)
        assert finding.values == [value] + [1.0] * 5


def test_a_secret_that_an_example_tells_does_not_count() -> None:
    of = AuditData(FORGET, [*RETAIN[:4], {"question": "Who?", "answer": SECRETS[0]}], tokenizer())
    (finding,) = attack(AskAfterExamples(TOKENS), original(), of)
    assert finding.values[0] is None and None not in finding.values[1:]


def test_a_row_that_is_rendered_already_is_no_example(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be wrapped into the template once more."""
    asked: list[Any] = []
    encode = AuditData.encode_prompts
    monkeypatch.setattr(AuditData, "encode_prompts", lambda of, rows: asked.extend(rows) or encode(of, rows))
    of = AuditData(FORGET, [RENDERED, *RETAIN], tokenizer())
    attack(AskAfterExamples(TOKENS), original(), of)
    assert [turn["content"] for turn in asked[0]["messages"][:-2:2]] == [row["question"] for row in RETAIN[:5]]


RENDERED = {
    "prompt": "<|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\n",
    "completion": "It is Ada Lovelace.",
    "spans": [[6, 18]],
}
SHORT = {"question": "Who?", "answer": "A cat", "spans": [[0, 1]]}
TOO_FEW = "it needs 5 retain rows to put in front, and there are"
SPECIAL = "the prompt of forget row 0 has special tokens in it, and cannot be changed"


@pytest.mark.parametrize(
    ("one", "rows", "retain", "why"),
    [
        (AskAfterExamples(4), FORGET, RETAIN[:3], f"{TOO_FEW} 3"),
        (AskAfterExamples(4), [RENDERED], RETAIN, SPECIAL),
        (
            AskAfterExamples(4),
            FORGET,
            [*RETAIN[:4], *[RENDERED] * 3],
            f"{TOO_FEW} 4 without special tokens in their prompts",
        ),
        (OnsetInQuestion(4, (1,)), [RENDERED], None, SPECIAL),
        (OnsetInQuestion(4, (1, 2)), [SHORT], None, "no secret has more tokens than a hint gives away"),
    ],
)
def test_what_an_attack_lacks_is_said(one: Attack, rows: Any, retain: Any, why: str) -> None:
    assert one.skip_reason(AuditData(rows, retain, tokenizer()), original()) == why


def test_a_rendered_prompt_can_be_asked_and_begun() -> None:
    of = AuditData([RENDERED], None, tokenizer())
    for one in (AskGreedily(4), AskWithPrefix(4), Sample(4, 2, 0), ExactProbability(), OnsetInAnswer(2)):
        assert attack(one, original(), of)
    (begun,) = of.answer_beginnings(PREFIX)
    assert tokenizer().decode(begun) == RENDERED["prompt"] + PREFIX


# --- many times ---
def test_draws_are_from_the_models_own_distribution() -> None:
    """Of a vocabulary of 480, also beyond the 50 likeliest; frequencies come near the softmax."""
    model = tiny_llama(vocab_size=len(tokenizer()), initializer_range=0.05)
    model.generation_config.temperature, model.generation_config.top_p = 0.1, 0.5  # the model's own do not count
    prompt, draws = data().prompts[0], 5_000
    with eval_mode(model), tqdm(disable=True) as bar, torch.random.fork_rng():
        written = generate_ids(
            model, [prompt] * draws, set(), pad=0, max_new_tokens=1, batch_tokens=10_000, bar=bar, sample=True
        )
        exact = model(input_ids=prompt[None]).logits[0, -1].softmax(-1).detach()
    counts = torch.bincount(torch.tensor(written).flatten(), minlength=len(exact))
    expected = exact * draws
    # Pearson's statistic is near its degrees of freedom (479, deviation 31).
    assert float(((counts - expected) ** 2 / expected).sum()) < 479 + 5 * 31
    assert int((counts > 0).sum()) > 400


def test_leak_at_k_is_made_of_the_counts() -> None:
    findings = attack(Sample(TOKENS, 12, 0), hides_from_greedy())
    assert [finding.name for finding in findings] == [f"sample: leak@{k}" for k in (1, 2, 4, 8, 12)]
    counts = [one["told"] for one in findings[0].evidence]
    assert findings[0].values == pytest.approx([count / 12 for count in counts])
    assert findings[-1].values == [float(count > 0) for count in counts]
    assert 0 < sum(counts) < 12 * len(SECRETS)
    for one, secret in zip(findings[0].evidence, SECRETS, strict=True):
        assert (one["first"] is not None) == (one["told"] > 0)
        assert one["first"] is None or secret in one["first"]
    again, other = (attack(Sample(TOKENS, 12, seed), hides_from_greedy()) for seed in (0, 1))
    assert findings == again != other


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_leak_at_k_is_the_share_of_subsets_that_tell(n: int) -> None:
    for c, k in product(range(n + 1), range(1, n + 1)):
        draws = [True] * c + [False] * (n - c)
        subsets = list(combinations(draws, k))
        assert leak_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


@torch.no_grad()
def test_exact_p_is_the_product_after_the_true_words() -> None:
    (finding,) = attack(ExactProbability(), hides_from_greedy())
    for secret, p, evidence in zip(data().secrets, finding.values, finding.evidence, strict=True):
        ids = data().rows[secret.row].example.input_ids
        log_p = hides_from_greedy()(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
        exact = sum(float(log_p[at - 1, ids[at]]) for at in range(secret.first, secret.stop))
        assert p == pytest.approx(torch.tensor(exact).exp().item(), rel=1e-4)
        assert evidence["log_probability"] == pytest.approx(exact, rel=1e-4)
        assert evidence["draws"] == pytest.approx(1 / p, rel=1e-4)
    draws = sorted(evidence["draws"] for evidence in finding.evidence)
    assert finding.figures["median 1/p"] == pytest.approx((draws[2] + draws[3]) / 2)


# --- with the onset ---
@pytest.mark.parametrize("planted", [original, never_saw, hides_from_greedy])
def test_one_scored_pass_tells_what_greedy_decoding_would_write(planted: Any) -> None:
    of, model = data(), planted()
    findings = attack(OnsetInAnswer(20), model)
    # No more is supplied than the longest secret has.
    assert [finding.name for finding in findings] == [f"onset: {j} in the answer" for j in range(6)]
    for j, finding in enumerate(findings):
        for secret, value in zip(of.secrets, finding.values, strict=True):
            if len(secret) <= j:
                assert value is None
                continue
            ids = of.rows[secret.row].example.input_ids
            (rest,) = attacked(model).generate([ids[: secret.first + j]], len(secret) - j)
            assert value == float(rest.ids == ids[secret.first + j : secret.stop].tolist())
    assert len(attack(OnsetInAnswer(2), never_saw())) == 3


def test_a_hint_gives_the_first_tokens_and_not_the_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    encode = AuditData.encode_prompts
    monkeypatch.setattr(AuditData, "encode_prompts", lambda of, rows: asked.extend(rows) or encode(of, rows))
    findings = attack(OnsetInQuestion(TOKENS, (1, 3)), original())
    questions = [row["question"] for row in asked]
    assert questions[0] == 'What is number 0? Hint: "Hina..."'
    assert len(questions) == 7  # one secret alone has more than three tokens
    assert questions[-1] == 'What is number 3? Hint: "06/30..."'
    assert [value is None for value in findings[1].values] == [True, True, True, False, True, True]
    assert findings[0].values == [1.0] * 6
