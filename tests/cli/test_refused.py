"""What the commands refuse: in one line that names the option and the fix, before a model is loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
from helpers.command import Commands, contents, palu_command, refusal, write_rows
from helpers.planted import FORGET
from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError
from transformers import AutoModelForCausalLM, AutoTokenizer

# Added to a command that would succeed; {folder} is that of the input.
OPTIONS: list[tuple[str, str, str]] = [
    ("unlearn", "--n 0", "n = 0: "),
    ("unlearn", "--checkpoint-dir none --checkpoint-steps 5", "checkpoint_steps = 5: give checkpoint_dir, too"),
    ("unlearn", "--epochs x", "epochs = 'x': give a positive integer, or None for the method's"),
    ("unlearn", "--objective x", "'x' is not one of 'palu', 'ga'"),
    ("unlearn", "--recipe papers", "'papers'"),
    ("unlearn", "--lr 1e-4", "No such option: --lr (Possible options: --learning-rate)"),
    ("unlearn", "--nonsense", "No such option: --nonsense"),
    ("unlearn", "--lora-alpha 4", "--lora-alpha was given without --lora; add --lora or leave it out"),
    ("unlearn", "--model a/b/c", "--model a/b/c: there is no such folder"),
    ("unlearn", "--model {folder}", "--model {folder}: the folder holds no config.json, so it is no model's"),
    ("unlearn", "--model no,model", "--model no,model: there is no such folder, and it cannot be a name on the hub"),
    ("unlearn", "--after /x", "--model {folder}/model is not the model of --after /x; leave it out"),
    ("unlearn", "--tokenizer {folder}", "--tokenizer {folder}: the folder holds no tokenizer"),
    ("unlearn", "--forget {folder}", "--forget {folder}: there is no such file"),
    ("unlearn", "--retain absent.csv", "--retain absent.csv: there is no such file"),
    ("unlearn", "--eval-rows absent.jsonl", "--eval-rows absent.jsonl: there is no such file"),
    ("unlearn", "--eval-steps 2", "--eval-steps 2: there is nothing to evaluate; add --eval-rows"),
    ("unlearn", "--eval-rows {folder}/bad.jsonl", "evaluation row 0 (line 1): column 'kind' is 'x'; give forget"),
    ("unlearn", "--forget {folder}/retain.jsonl", "forget row 0 (line 1): column 'secret' (or 'spans') is missing"),
    ("unlearn", "--output {folder}/model", "--output {folder}/model is the folder of --model; give another one"),
    ("unlearn", "--output {folder}", "--output {folder} has --model as its model/, which would be replaced"),
    ("unlearn", "--output {folder}/..", "--output {folder}/.. is not empty and holds no run; give another folder"),
    ("unlearn", "--output {folder}/retain.jsonl", "--output {folder}/retain.jsonl is a file; give a folder"),
    ("unlearn", "--output /proc/x", "--output /proc/x: nothing can be written to /proc (No such file or directory)"),
    ("unlearn", "--output {folder}/bad.jsonl/x", "--output {folder}/bad.jsonl/x: {folder}/bad.jsonl is a file;"),
    ("unlearn", "--cache-dir /proc/x", "cache_dir = '/proc/x': nothing can be written to /proc"),
    ("unlearn", "--logging-dir /proc/x --report-to wandb", "logging_dir = '/proc/x': nothing can be written"),
    ("unlearn", "--overwrite --resume", "--overwrite starts again and --resume goes on; give one of them"),
    ("unlearn", "--lora --dtype float16", "--dtype float16: gradients and steps underflow, an adapter's, too; give "),
    ("inspect", "--forget absent.jsonl", "--forget absent.jsonl: there is no such file"),
    ("inspect", "--model ./absent", "--model ./absent: there is no such folder"),
    ("inspect", "--html absent/roles.html", "--html absent/roles.html: there is no folder absent"),
    ("inspect", "--html {folder}", "--html {folder} is a folder; give a file"),
    ("inspect", "--html {folder}/forget.jsonl", "--html {folder}/forget.jsonl is the file of --forget, which would "),
    ("inspect", "--html /proc/roles.html", "--html /proc/roles.html: nothing can be written to /proc ("),
    ("inspect", "--annotate whole --write {folder}/model/../forget.jsonl", "forget.jsonl is the file of --forget"),
    ("inspect", "--write {folder}/retain.jsonl", "--write {folder}/retain.jsonl is there already, perhaps corrected "),
    ("inspect", "--annotate words", "annotate: 'words' names no way to find spans; give contrast, "),
    ("eval", "--rows {folder}/forget.jsonl --benchmark tofu", "--benchmark belongs to a benchmark; leave it out, or "),
    ("eval", "--rows {folder}/forget.jsonl --original ./no", "--original ./no: there is no such folder"),
    ("eval", "--rows absent.jsonl", "--rows absent.jsonl: there is no such file"),
    ("eval", "--original x", "--original stands beside a model on --rows; give them, or leave it out"),
    ("eval", "--benchmark muse-news --forget-split x", "--forget-split belongs to TOFU; leave it out"),
    ("eval", "--benchmark muse", "'muse' is not one of 'tofu', 'muse-news', 'muse-books'"),
    ("eval", "--benchmark muse-news --data {folder}", "No such file or directory"),
    ("eval", "--data {folder}/absent", "--data {folder}/absent: there is no such folder"),
    ("eval", "--data {folder} --forget-split forget07", "there is no forget split 'forget07'; {folder} has"),
    ("eval", "--retain-results absent.json", "--retain-results absent.json: there is no such file"),
    ("eval", "--language xx", "there is no word list for language 'xx'; give one of ar, bg, "),
    ("eval", "--output absent/results.json", "--output absent/results.json: there is no folder absent"),
    (
        "eval",
        "--rows {folder}/bad.jsonl --output {folder}/bad.jsonl",
        "{folder}/bad.jsonl is the file of --rows, which ",
    ),
    ("eval", "--retain-results {folder}/bad.jsonl --output {folder}/bad.jsonl", "is the file of --retain-results, "),
    ("eval", "--write-lm-eval {folder}", "--write-lm-eval {folder} is not empty; give a new folder"),
    ("eval", "--write-lm-eval {folder}/bad.jsonl", "--write-lm-eval {folder}/bad.jsonl: {folder}/bad.jsonl is a file;"),
    ("eval", "--write-lm-eval /proc/x", "--write-lm-eval /proc/x: nothing can be written to /proc ("),
    ("eval", "--write-lm-eval x --dtype float32", "--dtype belongs to an evaluation, and --write-lm-eval makes none"),
    ("eval", "--write-lm-eval x --max-new-tokens 9", "--max-new-tokens bounds answers, and the tasks of TOFU generate"),
    ("eval", "--write-lm-eval x --benchmark muse-books", "--write-lm-eval has no tasks for MUSE; give --rows or "),
    ("eval", "--model hub/model", "--model hub/model is no folder that the results could go to; give --output"),
    ("audit", "--original ./nowhere", "--original ./nowhere: there is no such folder"),
    ("audit", "--retain-model ./nowhere", "--retain-model ./nowhere: there is no such folder"),
    ("audit", "--retain no.jsonl", "--retain no.jsonl: there is no such file"),
    ("audit", "--draws 0", "Invalid value for '--draws': Input should be greater than or equal to 1"),
    (
        "audit",
        "--output {folder}/bad.jsonl",
        "--output {folder}/bad.jsonl: {folder}/bad.jsonl is a file; give a folder",
    ),
    ("audit", "--output /proc/x", "--output /proc/x: nothing can be written to /proc (No such file or directory); "),
    ("unlearn", "--device gpu", "--device gpu: torch has no such device here; give one of cpu"),
    ("inspect", "--annotate contrast --device cpu:1", "--device cpu:1: torch has no such device here; give one of cpu"),
    ("inspect", "--device cpu", "--device was given without --annotate, which may run a model; leave it out"),
    ("eval", "--device cuda:99", "--device cuda:99: torch has no such device here; give one of cpu"),
    ("audit", "--device gpu", "--device gpu: torch has no such device here; give one of cpu"),
    ("report", "{folder}/absent", "there is no folder {folder}/absent"),
]


@pytest.mark.parametrize(("command", "options", "told"), OPTIONS)
def test_options(
    command: str, options: str, told: str, folder: Path, commands: Commands, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("a model is loaded"))
    if "/proc/" in options:  # before anything is loaded
        monkeypatch.setattr(AutoTokenizer, "from_pretrained", None)
    if "hub/" in options:
        monkeypatch.setattr(HfApi, "model_info", lambda *_, **__: None)
    before = contents(folder)
    given = [word.replace("no,model", "no model") for word in options.format(folder=folder).split()]
    said = refusal(palu_command(*commands[command], *given))
    assert told.format(folder=folder).replace("no,model", "no model") in said
    assert contents(folder) == before and not out.exists()


def test_options_that_must_be_there(folder: Path) -> None:
    assert refusal(palu_command("inspect", "--forget", folder / "forget.jsonl")) == "give --model or --tokenizer"
    given = ["--forget", folder / "unmarked.jsonl", "--tokenizer", folder / "model", "--annotate", "contrast"]
    assert refusal(palu_command("inspect", *given)) == "--annotate contrast asks the model itself; give --model"


def test_a_run_to_go_on_from(folder: Path, out: Path, tmp_path: Path) -> None:
    given = ["unlearn", "--forget", folder / "forget.jsonl", "--output", out]
    assert refusal(palu_command(*given)) == "give --model, or --after and a run's folder to go on from its model"
    told = f"{tmp_path} is not the folder of a run; give the folder that palu unlearn wrote"
    assert refusal(palu_command(*given, "--after", tmp_path)) == told
    own = refusal(palu_command(*given, "--after", tmp_path, "--output", tmp_path))
    assert own.startswith(f"--output {tmp_path} has the model of --after as its model/, which would be replaced; ")
    assert "with --after the reference is that run's model" in refusal(
        palu_command(*given, "--after", tmp_path, "--ref-model", folder / "model")
    )


def test_layers_that_are_not_there(arguments: list[Any]) -> None:
    assert "Target modules" in refusal(palu_command(*arguments, "--lora", "--lora-target", "nothing"))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("lerning_rate: 1", "{file}: unknown key 'lerning_rate'; did you mean learning_rate?"),
        ("lr: 1e-4", "{file}: unknown key 'lr'; did you mean learning_rate?"),
        ("xyzzy: 1", "{file}: unknown key 'xyzzy'; the keys are model, forget, output, "),
        ("learning-rate: 1", "{file}: unknown key 'learning-rate'; did you mean learning_rate?"),
        ("config: other.yaml", "{file}: unknown key 'config'; "),
        ("epochs: 1\nn: 3\nepochs: 2", "{file}: key 'epochs' is there twice; keep one of them"),
        ("chat_template_kwargs:\n  a: 1\n  a: 2", "{file}: key 'a' is there twice; keep one of them"),
        ("- epochs", "{file} holds a list; write one 'name: value' a line"),
        ("epochs: [", "{file} is not YAML: while parsing"),
        ("max_length: many", "max_length = 'many': give an integer above 1"),
        ("max_length: null", "max_length = 'none': give an integer above 1"),
        ("max_tokens: many", "max_tokens = 'many': give a positive integer, or None for no bound"),
    ],
)
def test_config_file(content: str, told: str, arguments: list[Any], tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(content)
    assert told.format(file=file) in refusal(palu_command(*arguments, "--config", file))


# --- names of models ---
def absent(*_: Any, **__: Any) -> None:
    raise RepositoryNotFoundError("404", response=MagicMock())


def out_of_reach(*_: Any, **__: Any) -> None:
    raise ConnectionError("no route to host")


@pytest.mark.parametrize(
    ("name", "answer", "told"),
    [
        ("nobody/nothing", absent, "and no such model on the hub, or it is private (hf auth login)"),
        ("nosuch", out_of_reach, "and the hub, whose cache lacks it, cannot be reached (no route to host)"),
    ],
)
def test_a_name_that_is_no_folder_and_not_on_the_hub(
    name: str, answer: Callable[..., None], told: str, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is said at once, by every command that takes a model's name, and the hub is asked once."""
    asked: list[float] = []
    monkeypatch.setattr(HfApi, "model_info", lambda *_, timeout: asked.append(timeout) or answer())
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", None)
    for command in ("unlearn", "inspect", "eval", "audit"):
        asked.clear()
        said = refusal(palu_command(*commands[command], "--model", name))
        assert said == f"--model {name}: there is no such folder, {told}"
        assert len(asked) == 1 and asked[0] <= 10


def test_a_name_that_the_hub_knows_or_its_cache_holds(
    arguments: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loading goes on with it: a name without a slash, such as gpt2, is as good as any."""
    loaded: list[str] = []

    def load(name: str, *_: Any, **__: Any) -> None:
        loaded.append(name)
        raise OSError("far enough")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", load)
    monkeypatch.setattr(HfApi, "model_info", lambda *_, **__: None)
    assert refusal(palu_command(*arguments, "--model", "gpt2")) == "far enough"

    monkeypatch.setattr(HfApi, "model_info", out_of_reach)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    cached = tmp_path / "models--distilgpt2"
    for file, content in ((f"snapshots/{'0' * 40}/config.json", "{}"), ("refs/main", "0" * 40)):
        (cached / file).parent.mkdir(parents=True)
        (cached / file).write_text(content)
    assert refusal(palu_command(*arguments, "--model", "distilgpt2")) == "far enough"
    assert loaded == ["gpt2", "distilgpt2"]


# --- rows ---
@pytest.mark.parametrize("command", ["inspect", "unlearn", "audit"])
def test_a_row(
    command: str, folder: Path, commands: Commands, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is named by its number and its line; tests/test_bad_input.py has what can be wrong with one."""
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("a model is loaded"))
    given = commands[command]
    slip = {"question": "Who?", "answer": FORGET[1]["answer"], "secret": "ada lovelace"}
    forget = write_rows(tmp_path / "forget.jsonl", [FORGET[0], slip])
    told = "forget row 1 (line 2): secret 'ada lovelace' is not in the answer; did you mean 'Ada Lovelace'?"
    assert refusal(palu_command(*given, "--forget", forget)) == told
    if command != "inspect":
        both = refusal(palu_command(*given, "--retain", folder / "forget.jsonl"))
        assert both.startswith("forget row 0 and retain row 0 are the same, prompt and answer (and 5 more): ")
    assert not out.exists()
