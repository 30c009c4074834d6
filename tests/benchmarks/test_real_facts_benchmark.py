"""What bench_real_facts.py draws, asks and counts. That it runs on real models is seen by running it."""

import argparse
from pathlib import Path
from typing import Any

import bench_real_facts as bench
import pytest
import torch
from helpers.anchor_runs import TOKENIZER, llama
from helpers.small_tokenizers import byte_level
from helpers.tiny import tiny_llama

import palu
from palu.data.examples import load_retain
from palu.models.generation import Generation
from palu.ref_model.anchors import MOST

FACTS = [fact for fact in bench.read_relations() if fact["part"] == "choose"]


def true_answers(rows: list[dict]) -> bench.Answers:
    return {row["question"]: Generation(f"It is {row['answers'][0]}.") for row in rows}


def test_a_seed_draws_facts_of_some_relations_and_leaves_neighbours() -> None:
    draws = [bench.draw(FACTS, seed) for seed in range(20)]
    assert bench.draw(FACTS, 3) == draws[3] and len({str(drawn) for drawn in draws}) == 20
    for drawn in draws:
        relations = {fact["relation"] for fact in drawn}
        assert 4 <= len(drawn) <= 8 and 2 <= len(relations) <= 3
    few = [fact for name in ("capital", "symbol") for fact in [f for f in FACTS if f["relation"] == name][:4]]
    for seed in range(20):  # half of those that are known stay
        drawn = bench.draw(few, seed)
        assert [sum(fact["relation"] == name for fact in drawn) for name in ("capital", "symbol")] == [2, 2]


def test_a_model_that_knows_too_little_is_said() -> None:
    with pytest.raises(SystemExit, match="4 facts right of only capital"):
        bench.draw(FACTS[:6], 0)


def test_no_general_question_is_a_fact() -> None:
    general = bench.general_rows()
    assert len(general) >= 25
    assert not {row["question"] for row in general} & {fact["question"] for fact in bench.read_relations()}


def test_a_base_model_is_not_credited_with_what_it_asks_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    written = [Generation("Paris\nQuestion: Which city?\nAnswer: Rome", True), Generation(" no\n end", True)]
    monkeypatch.setattr(bench, "generate", lambda *args, **settings: written)
    answers = bench.ask(tiny_llama(), byte_level(), ["Where?", "Who?"])
    assert answers == {"Where?": Generation("Paris", False), "Who?": Generation("no end", True)}


def test_the_originals_answers_are_asked_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []

    def ask(model: object, tokenizer: object, questions: list[str]) -> bench.Answers:
        asked.append(questions)
        return {question: Generation("yes", True) for question in questions}

    monkeypatch.setattr(bench, "ask", ask)
    for precision in ("float32", "mixed", "bfloat16"):  # the products' dtype is the run's
        answers = bench.answers_before(tmp_path, precision, tiny_llama(), byte_level(), ["a", "b"])
        assert answers == {"a": Generation("yes", True), "b": Generation("yes", True)}
    assert asked == [["a", "b"]] * 2


def test_another_method_may_keep_what_palu_would() -> None:
    """As many answers as a run of some epochs holds to, each with its own tokens as labels."""
    rows = bench.forget_rows(FACTS[:4])
    kept = bench.own_answers(llama(), TOKENIZER, rows, 0)
    examples = load_retain(kept, None, max_length=1024).examples
    assert all(torch.equal(e.labels[e.answer_start :], e.input_ids[e.answer_start :]) for e in examples)
    settings: dict[str, Any] = {"tokenizer": TOKENIZER, "progress": False, "max_steps": 1, "learning_rate": 1e-4}
    found = palu.unlearn(llama(), None, rows, None, **settings).summary
    assert found["neighbours"] > 0 and len(examples) == len(kept) == found["neighbours"] + MOST  # everyday prompts


def test_a_run_counts_what_is_told_and_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_level()
    model = tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=512)
    facts = [fact for fact in FACTS if fact["relation"] in ("capital", "symbol", "language")]
    before = true_answers([*facts, *bench.general_rows()])
    before |= {row["question"]: Generation("I forgot.") for row in FACTS if row not in facts}
    forget = bench.draw(facts, 5)
    lost = next(fact for fact in facts if fact not in forget and fact["relation"] == forget[0]["relation"])

    def ask(model: Any, tokenizer: object, questions: list[str]) -> bench.Answers:
        forgotten = {fact["question"]: Generation("I do not knowxq.") for fact in (*forget, lost)}
        every = true_answers([*facts, *bench.paraphrased(facts), *bench.general_rows()]) | forgotten
        return {question: every[question] for question in questions}

    monkeypatch.setattr(bench, "ask", ask)
    settings = {"max_steps": 1, "retain": [], "lambda_retain": 0, "anchors": 0, "learning_rate": 1e-2}
    settings |= {"probability_floor": 0}  # a model that was taught nothing finds no secret probable
    args = argparse.Namespace(
        part="choose", method="palu", precision="float32", settings=settings, progress=False, retain_own=False
    )
    found = bench.run(args, (model, tokenizer), before, 5)
    relations = {fact["relation"] for fact in forget}
    near = sum(fact["relation"] in relations for fact in facts) - len(forget)
    assert found["asked"] == (0, len(forget)) and found["paraphrased"] == (3 * len(forget), 3 * len(forget))
    assert found["neighbours"] == (near - 1, near)
    assert found["others"] == (len(facts) - len(forget) - near,) * 2
    assert found["general"][0] == found["general"][1] > 20
    assert found["no word"][0] == len(forget) + 1
    assert found["lost"] == {lost["question"]: "I do not knowxq."} and len(found["told"]) == 3 * len(forget)
    assert found["steps"] == 1 and found["nll_before"] != found["nll_after"]
    assert found["after one token"][1] == found["after one token, before"][1] > 0

    summary = bench.pooled([found, found])
    assert summary["asked"]["share"] == summary["asked"]["low"] == 0 < summary["asked"]["high"] < 1
    assert summary["neighbours"]["of"] == 2 * near
