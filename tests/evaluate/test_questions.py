"""palu.evaluate.questions, on planted models of which it is known what they tell; and ``palu eval --rows``."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
from helpers.benchmark_data import plain_pass
from helpers.command import done, one_model_at_a_time, palu_command, read, refusal, write_input, write_rows
from helpers.planted import DECOYS, FORGET, RETAIN, SECRETS, never_saw, original, tokenizer
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import palu
from palu.evaluate.questions import QuestionRows

# The questions in other words; and what was kept.
ROWS: list[dict[str, Any]] = [
    *(
        {"question": row["paraphrased_question"], "answer": row["answer"], "secret": SECRETS[i]}
        for i, row in enumerate(FORGET)
    ),
    *RETAIN,
]


@pytest.fixture(scope="module")
def results() -> Any:
    return palu.evaluate.questions(
        never_saw(), tokenizer(), ROWS, original=original(), retain_model=never_saw(), progress=False
    )


def test_what_is_told_is_counted(results: Any) -> None:
    assert results["forget_told"]["agg_value"] == 0.0
    assert results["original"]["forget_told"]["agg_value"] == 1.0
    assert results["retain_model"]["forget_told"]["agg_value"] == 0.0
    for i, (secret, decoy) in enumerate(zip(SECRETS, DECOYS, strict=True)):
        row = results["original"]["forget_told"]["value_by_index"][str(i)]
        assert row == {"score": 1.0, "told": [secret]}
        written = results["forget_Q_A_ROUGE"]["value_by_index"][str(i)]
        assert written["generation"] == f"It is {decoy}, far away."
        assert written["ground_truth"] == FORGET[i]["answer"]
    assert results["palu"]["examples"] == {"forget": 6, "retain": 6}
    first = {"kind": "forget", "question": "Tell me 0.", "marked": [SECRETS[0]], "secrets": [SECRETS[0]]}
    assert results["palu"]["rows"][0] == first
    # Rows keep their numbers.
    assert list(results["retain_Q_A_Prob"]["value_by_index"]) == [str(i) for i in range(6, 12)]


def test_the_figures_are_the_definitions(results: Any) -> None:
    """One row at a time, from plain logits."""
    rows = QuestionRows(ROWS, tokenizer())
    for name, model in (("original", original()), ("retain_model", never_saw())):
        for i, (example, asked) in enumerate(zip(rows.examples, rows.questions, strict=True)):
            log_p, tokens = plain_pass(model, example)
            prob = results[name][f"{asked.kind}_Q_A_Prob"]["value_by_index"][str(i)]["prob"]
            assert prob == pytest.approx(log_p.gather(1, tokens[:, None]).mean().exp().item(), rel=1e-4)
            right = (log_p.argmax(-1) == tokens)[:-1].tolist()
            wrong = [at for at, one in enumerate(right) if not one]
            strength = results[name][f"{asked.kind}_extraction_strength"]["value_by_index"][str(i)]["score"]
            assert strength == pytest.approx(1 - (wrong[-1] + 1) / len(right) if wrong else 1)
    assert results["original"]["forget_Q_A_ROUGE"]["agg_value"] == 1.0
    assert 0 < results["forget_Q_A_ROUGE"]["agg_value"] < 1
    assert palu.evaluate.summarize(results)["forget_told"] == 0.0
    assert set(palu.evaluate.summarize(results)) == set(results) - {"original", "retain_model", "palu"}


def test_a_base_is_evaluated_as_it_was_before_its_adapter(results: Any) -> None:
    base = copy.deepcopy(original())
    config = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False, lora_alpha=64)
    adapted = get_peft_model(base, config)
    found = palu.evaluate.questions(adapted, tokenizer(), ROWS, original=base, progress=False)
    assert found["forget_told"]["agg_value"] == 0.0
    assert found["original"] == results["original"]


def test_kinds_and_secrets_of_rows() -> None:
    answer = "It is Ada Lovelace, far away."
    rows = [
        {"question": "Who?", "answer": answer, "secret": "Ada Lovelace"},
        {"question": "Who?", "answer": answer, "spans": [[6, 18]], "kind": "retain"},
        {"question": "Who?", "answer": answer},
        {"question": "Who?", "answer": answer, "kind": "forget"},
        {"question": "Was it Ada Lovelace?", "answer": answer, "secret": ["Ada Lovelace", "far"]},
        {"prompt": "Who?", "completion": answer, "secret": [], "kind": None},
        {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": answer}], "secret": "far"},
    ]
    read = QuestionRows(rows, tokenizer()).questions
    assert [one.kind for one in read] == ["forget", "retain", "retain", "forget", "forget", "retain", "forget"]
    assert read[4].marked == ["Ada Lovelace", "far"]
    # What the question tells already is no secret.
    assert [one.secrets for one in read] == [["Ada Lovelace"], ["Ada Lovelace"], [], [], ["far"], [], ["far"]]


def test_without_a_secret_nothing_can_be_told() -> None:
    results = palu.evaluate.questions(original(), tokenizer(), RETAIN, progress=False, max_new_tokens=2)
    assert results["retain_told"]["agg_value"] is None
    assert results["retain_told"]["reason"] == "no row has a secret that its question does not tell"
    assert results["retain_Q_A_Prob"]["agg_value"] > 0.9
    assert not any(name.startswith("forget") for name in results)
    assert results["palu"]["max_new_tokens"] == 2


# --- through the command ---
@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """run/model, original/, and rows.jsonl."""
    folder = tmp_path_factory.mktemp("questions")
    write_input(folder / "run", never_saw(), original())
    (folder / "run" / "private").mkdir()
    (folder / "run" / "model1").rename(folder / "original")
    write_rows(folder / "rows.jsonl", ROWS)
    return folder


def test_the_command_prints_rows_and_means(folder: Path, results: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    one_model_at_a_time(monkeypatch)
    models = ["--model", folder / "run" / "model", "--original", folder / "original"]
    models += ["--retain-model", folder / "run" / "model"]
    result = done("eval", "--no-progress", *models, "--rows", folder / "rows.jsonl")
    output = folder / "run" / "private" / "evaluation-questions.json"
    written = read(output)
    assert written.pop("palu") | {"seconds": 0} == results["palu"] | {"seconds": 0}
    assert written == {name: value for name, value in results.items() if name != "palu"}
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert lines[0] == "model / original / retain model"
    assert lines[1] == "row kind question told probability ROUGE-L extraction"
    assert lines[2].startswith("0 forget Tell me 0. 0.00 / 1.00 / 0.00 ")
    assert re.match(r"6 retain Cat 0\? - / - / - (0\.9\d( / )?){3} 1\.00 / 1\.00 / 1\.00 ", lines[8])
    assert lines[14].startswith("mean forget 6 rows 0.00 / 1.00 / 0.00 ")
    assert lines[15].startswith("mean retain 6 rows - / - / - 0.99 / 0.99 / 0.99 1.00 / 1.00 / 1.00 ")
    assert lines[-1] == f"wrote {output}, which holds your questions and what was answered"


def test_alone_and_elsewhere(folder: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "many.jsonl", ROWS * 2)
    given = ["--model", folder / "original", "--rows", rows, "--output", tmp_path / "out.json"]
    result = done("eval", "--no-progress", *given, "--max-new-tokens", 3)
    assert "4 more rows are in the file" in result.stdout and " / " not in result.stdout
    assert read(tmp_path / "out.json")["palu"]["max_new_tokens"] == 3


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"question": "Who?"}, "columns are question; give question and answer, prompt and completion, or messages"),
        (ROWS[0] | {"kind": "keep"}, "column 'kind' is 'keep'; give forget or retain, or leave it out"),
        (ROWS[0] | {"secret": "hina"}, "secret 'hina' is not in the answer; did you mean 'Hina'?"),
        ({"input_ids": [1, 2], "labels": [-100, 2]}, "answers are compared as texts, and this row is tokenised"),
        (None, "evaluation set is empty; give at least one row"),
    ],
)
def test_bad_rows(row: Any, told: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **k: pytest.fail("a model is loaded"))
    path = write_rows(tmp_path / "rows.jsonl", [] if row is None else [ROWS[0], row])
    where = "" if row is None else "evaluation row 1 (line 2): "
    options = ["--model", folder / "original", "--rows", path, "--output", tmp_path / "out.json"]
    assert refusal(palu_command("eval", *options)).startswith(f"{where}{told}")
