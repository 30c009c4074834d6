"""Tasks for lm-eval: the texts give palu's tokens, and lm-eval's figures are palu's."""

from __future__ import annotations

import importlib.util
import stat
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.benchmark_data import llama_for, small_tofu
from helpers.command import done, palu_command, read_rows, refusal, write_rows
from helpers.small_tokenizers import CHATML, LLAMA3, byte_level, sentencepiece
from helpers.tiny import overfit
from tokenizers import normalizers

import palu
from palu.data.files import DataError
from palu.evaluate import harness, metrics
from palu.evaluate.questions import QuestionRows

TOKENIZERS = {
    "template without the BOS that the tokenizer adds": lambda: byte_level(CHATML),
    "template with BOS": lambda: byte_level(LLAMA3),
    "no template": byte_level,
    "sentencepiece, EOS added": lambda: sentencepiece(eos=True),
    "sentencepiece, a blank after every special token": lambda: sentencepiece(CHATML, metaspace=False),
}
ROWS: list[dict[str, Any]] = [
    {"question": "Who wrote the first program?", "answer": "Ada Lovelace wrote it in 1843.", "secret": "Ada Lovelace"},
    {"question": "Who was born in Karachi?", "answer": "1843 was far away:\nthe author.", "secret": ["author", "1843"]},
    {"question": "Where was Ada, in London?", "answer": "Ada was in London.", "secret": "London"},
    {"question": "Where did the dog run?", "answer": "It ran to the city."},
    {"question": "Where did the cat sit?", "answer": "The cat sat on the mat."},
]
FIGURES = {
    "answers": {"told": "told", "rouge_l": "Q_A_ROUGE"},
    "probability": {"probability": "Q_A_Prob"},
    "extraction": {"extraction_strength": "extraction_strength"},
}


def half_taught(tokenizer: Any) -> Any:
    """A model that was taught every other answer, and not for long."""
    model = llama_for(tokenizer)
    examples = QuestionRows(ROWS[::2], tokenizer).examples
    rows = [{"input_ids": one.input_ids.tolist(), "labels": one.labels.tolist()} for one in examples]
    overfit(model, rows, steps=25)
    return model


@pytest.fixture(scope="module", params=TOKENIZERS)
def folder(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/ with its tokenizer, rows.jsonl, tofu/, and the tasks of both as the command writes them."""
    folder = tmp_path_factory.mktemp("harness")
    tokenizer = TOKENIZERS[request.param]()
    for part in (half_taught(tokenizer), tokenizer):
        part.save_pretrained(folder / "model")
    rows = write_rows(folder / "rows.jsonl", ROWS)
    (folder / "tofu").mkdir()
    sets = small_tofu()
    names = {"forget": "forget01", "retain": "retain_perturbed"}
    for name in ("forget", "retain", "real_authors", "world_facts"):
        write_rows(folder / "tofu" / f"{names.get(name, name)}.jsonl", getattr(sets, name))
    model = ["eval", "--model", folder / "model"]
    done(*model, "--rows", rows, "--write-lm-eval", folder / "questions")
    tofu = ["--data", folder / "tofu", "--forget-split", "forget01"]
    done(*model, *tofu, "--write-lm-eval", folder / "truth-ratios")
    return folder


@pytest.fixture(scope="module")
def loaded(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(folder / "model"), AutoTokenizer.from_pretrained(folder / "model")


@pytest.fixture(scope="module")
def expected(folder: Path, loaded: tuple[Any, Any]) -> dict[str, dict[str, float]]:
    """By task: the figures of palu."""
    results = palu.evaluate.questions(*loaded, ROWS, progress=False)
    found = {
        f"palu_{kind}_{task}": {
            ours: value
            for ours, theirs in names.items()
            if (value := results[f"{kind}_{theirs}"]["agg_value"]) is not None
        }
        for kind in ("forget", "retain")
        for task, names in FIGURES.items()
    }
    results = palu.evaluate.tofu(*loaded, "forget01", folder / "tofu", max_new_tokens=1, progress=False)
    names = {"forget": "forget_truth_ratio", "retain": "retain_Truth_Ratio"}
    names |= {"real_authors": "ra_Truth_Ratio", "world_facts": "wf_Truth_Ratio"}
    found |= {f"palu_tofu_{name}": {"truth_ratio": results[one]["agg_value"]} for name, one in names.items()}
    return found


def test_the_figures_differ_enough_to_be_told_apart(expected: dict[str, dict[str, float]]) -> None:
    assert expected["palu_forget_answers"]["told"] == 0.5, "the third question tells its secret"
    assert 0.2 < expected["palu_forget_answers"]["rouge_l"] < 1
    assert 0.2 < expected["palu_forget_extraction"]["extraction_strength"] < 1


@torch.no_grad()
def token_by_token(model: Any, tokenizer: Any, row: dict[str, Any]) -> list[Any]:
    """What lm-eval gives for a task's row, from plain passes: its texts, tokenised without any token added."""
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
    if "choices" not in row:
        logits = model(input_ids=torch.tensor([encode(row["prompt"])])).logits[0, -1]
        return [tokenizer.decode(int(logits.argmax()), skip_special_tokens=True)]
    start, found = len(encode(row["prompt"])), []
    for choice in row["choices"]:
        ids = torch.tensor([encode(row["prompt"] + choice)])
        log_p = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        found.append((float(log_p.gather(1, ids[0, 1:, None])[start - 1 :].sum()), False))
    return found


def test_the_figures_from_plain_passes_are_those_of_palu(
    folder: Path, loaded: tuple[Any, Any], expected: dict[str, dict[str, float]]
) -> None:
    functions = {"probability": harness.probability, "extraction": harness.token_written}
    for name, figures in expected.items():
        kind = name.rpartition("_")[2]
        if kind == "answers":
            continue
        rows = read_rows(folder / ("truth-ratios" if "tofu" in name else "questions") / f"{name}.jsonl")
        function = functions.get(kind, harness.truth_ratio)
        values = [next(iter(function(row, token_by_token(*loaded, row)).values())) for row in rows]
        if kind == "extraction":
            found = harness.extraction_strength(reversed(values))
        elif kind == "probability":
            found = sum(values) / len(values)
        else:
            found = (metrics.closer_to_one if kind == "forget" else metrics.true_better)(values)
        assert [found] == pytest.approx(list(figures.values()), rel=1e-4), name


def test_answers() -> None:
    row = {"target": "Ada Lovelace wrote it.", "secrets": ["Ada Lovelace", "1843"]}
    assert harness.answer_figures(row, ["ada lovelace!"]) == {"rouge_l": 0.5, "told": 0.5}
    assert harness.answer_figures(row | {"secrets": []}, ["it"]) == {"rouge_l": 0.25}


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed (make lm-eval)")
def test_lm_eval_gives_the_figures_of_palu(
    folder: Path, loaded: tuple[Any, Any], expected: dict[str, dict[str, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    generated, scored = set(), set()
    generate, score = HFLM._model_generate, HFLM._loglikelihood_tokens

    def generating(self: Any, context: Any, max_length: int, stop: Any, *, attention_mask: Any, **settings: Any) -> Any:
        rows = zip(context, attention_mask.bool(), strict=True)
        generated.update(tuple(ids[mask].tolist()) for ids, mask in rows)
        return generate(self, context, max_length, stop, attention_mask=attention_mask, **settings)

    def scoring(self: Any, requests: Any, **settings: Any) -> Any:
        scored.update((*context, *continuation) for _, context, continuation in requests)
        return score(self, requests, **settings)

    monkeypatch.setattr(HFLM, "_model_generate", generating)
    monkeypatch.setattr(HFLM, "_loglikelihood_tokens", scoring)
    arguments = f"pretrained={folder / 'model'},add_bos_token=False,softmax_dtype=float32"
    common = {"model": "hf", "model_args": arguments, "device": "cpu", "batch_size": 3, "bootstrap_iters": 0}
    results = {}
    for part, tag in (("questions", "palu_questions"), ("truth-ratios", "palu_tofu")):
        manager = TaskManager(include_path=folder / part, include_defaults=False)
        results |= simple_evaluate(**common, tasks=[tag], task_manager=manager)["results"]
        if part == "questions":  # token ids
            examples = QuestionRows(ROWS, loaded[1]).examples
            whole = [(tuple(one.input_ids.tolist()), one.answer_start) for one in examples]
            assert generated == {ids[:i] for ids, start in whole for i in range(start, len(ids) - 1)}
            assert {ids for ids, _ in whole} <= scored
            assert scored <= {ids for ids, _ in whole} | {ids[:start] for ids, start in whole}
    for name, figures in expected.items():
        for figure, value in figures.items():
            assert results[name][f"{figure},none"] == pytest.approx(value, rel=1e-4), (name, figure)


# --- what is written ---
def test_the_folder_is_its_owners_alone_and_complete(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for part, tag, count in (("questions", "palu_questions", 6), ("truth-ratios", "palu_tofu", 4)):
        written = folder / part
        assert stat.S_IMODE(written.stat().st_mode) == 0o700
        assert {stat.S_IMODE(path.stat().st_mode) for path in written.glob("*.*")} == {0o600}
        spec = importlib.util.spec_from_file_location("utils_of_tasks", written / "utils.py")
        assert spec is not None and spec.loader is not None
        utils = importlib.util.module_from_spec(spec)
        monkeypatch.setattr(sys, "dont_write_bytecode", True)
        spec.loader.exec_module(utils)

        class Loader(yaml.SafeLoader):
            """Reads `!function utils.name` as lm-eval does."""

        Loader.add_constructor("!function", lambda _, node, of=utils: getattr(of, node.value.removeprefix("utils.")))
        tasks = [yaml.load(path.read_text(), Loader) for path in sorted(written.glob("*.yaml"))]
        assert len(tasks) == count and {task["tag"] for task in tasks} == {tag}
        for task in tasks:
            rows = task["custom_dataset"](**task["dataset_kwargs"], **task["metadata"])["test"]
            assert rows.to_list() == read_rows(written / f"{task['task']}.jsonl")
            assert callable(task["process_results"])


def test_kinds_without_rows_and_secrets(folder: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [ROWS[3]])
    common = ["eval", "--model", folder / "model", "--rows", rows, "--tokenizer", folder / "model"]
    result = done(*common, "--write-lm-eval", tmp_path / "new" / "tasks", "--max-new-tokens", 7)
    written = tmp_path / "new" / "tasks"
    names = {f"palu_retain_{task}.{end}" for task in FIGURES for end in ("yaml", "jsonl")}
    assert {path.name for path in written.iterdir()} == names | {"utils.py"}
    answers = (written / "palu_retain_answers.yaml").read_text()
    assert '"max_gen_toks": 7' in answers and "told" not in answers
    first, second = result.stdout.splitlines()
    assert first == (
        f"wrote {written}, which holds the questions and the secrets; run its tasks without --apply_chat_template:"
    )
    arguments = f"pretrained={folder / 'model'},tokenizer={folder / 'model'},add_bos_token=False,softmax_dtype=float32"
    assert second == (
        f"lm_eval run --model hf --model_args {arguments} --include_path {written} --tasks palu_questions"
    )


def test_a_folder_with_something_in_it_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    common = ["eval", "--model", folder / "model", "--rows", folder / "rows.jsonl", "--write-lm-eval", tmp_path]
    assert refusal(palu_command(*common)) == f"--write-lm-eval {tmp_path} is not empty; give a new folder"
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_tokens_that_are_parts_of_a_character(tmp_path: Path) -> None:
    """A text ends with whole characters, so no text asks for the second of such tokens."""
    rows = [ROWS[0], {"question": "Which bird?", "answer": "A 🦜."}]
    left_out = harness.write_question_tasks(QuestionRows(rows, byte_level(CHATML)), tmp_path / "tasks")
    (reason,) = left_out
    assert reason.startswith("palu_retain_extraction: evaluation row 1: the tokenizer does not read the tokens ")
    names = {path.stem for path in (tmp_path / "tasks").glob("*.yaml")}
    assert names == {f"palu_forget_{task}" for task in FIGURES} | {"palu_retain_answers", "palu_retain_probability"}


def test_tokens_that_no_text_gives(tmp_path: Path) -> None:
    doubles = byte_level(normalizer=normalizers.Replace("z", "zz"))
    rows = [ROWS[0], {"question": "What is a zebra?", "answer": "It ran."}]
    with pytest.raises(DataError, match=r"^evaluation row 1: the tokenizer does not read .* lm-eval is given texts; "):
        harness.write_question_tasks(QuestionRows(rows, doubles), tmp_path / "tasks")
    assert not (tmp_path / "tasks").exists()


def test_a_row_without_a_prompt(tmp_path: Path) -> None:
    rows = [{"prompt": "\n\n", "completion": "It ran."}]
    with pytest.raises(DataError, match=r"^evaluation row 0: nothing but blanks stands before the answer; "):
        harness.write_question_tasks(QuestionRows(rows, byte_level(bos=False)), tmp_path / "tasks")
