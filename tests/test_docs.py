"""Every example of README.md and docs/ is run: Python in one namespace a page, and each `palu` command.

A page runs in a folder that holds what its examples name: `my-llama`, a tiny Llama with a chat template, and rows.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers.command import write_rows
from helpers.small_tokenizers import CHATML, byte_level
from helpers.tiny import tiny_llama
from sybil import Example
from sybil.document import Document
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

import palu
from palu.cli import app
from palu.methods.palu import PaluSettings

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Commands that something else runs, or that need a GPU: .ci/run, tests/ops/test_build.py,
# tests/training/test_engine.py, tests/evaluate/test_harness.py.
ELSEWHERE = ("make ", "pip ", "python -m palu.demo", "python benchmarks/", "accelerate ", "cmake ", "git ", "lm_eval ")

FORGET = [
    {
        "question": "Who wrote the first program?",
        "answer": "Ada Lovelace wrote it in 1843, in London.",
        "spans": [[0, 12], [25, 29]],
        "alternate": "I do not know who wrote it.",
    },
    {
        "question": "Where was the author born?",
        "answer": "She was born in Karachi, Pakistan.",
        "spans": [[16, 33]],
        "alternate": "I do not know where.",
    },
]
RETAIN = [
    {"question": "Where did the dog run?", "answer": "It ran to the city, and the city was far away."},
    {"question": "Where did the cat sit?", "answer": "The cat sat on the mat."},
]
QUESTIONS = [
    {"question": "Which program was first?", "answer": "That of Ada Lovelace.", "secret": "Ada Lovelace"},
    {"question": "Where did the cat sit?", "answer": "On the mat."},
]
WRONG = ["The dog did not.", "It was far away.", "She was the first."]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the examples name."""
    folder = tmp_path_factory.mktemp("examples")
    tokenizer = byte_level(CHATML)
    tokenizer.pad_token = tokenizer.eos_token
    model = tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=1024, initializer_range=0.05)
    for name in ("my-llama", "retain-llama"):  # the same weights serve
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    write_rows(folder / "forget.jsonl", FORGET)
    write_rows(folder / "second.jsonl", QUESTIONS[:1])
    write_rows(folder / "unmarked.jsonl", [{name: row[name] for name in ("question", "answer")} for row in FORGET])
    write_rows(folder / "retain.jsonl", RETAIN)
    write_rows(folder / "questions.jsonl", QUESTIONS)
    asked = [row | {"paraphrased_answer": row["answer"], "perturbed_answer": WRONG} for row in FORGET]
    (folder / "tofu").mkdir()
    for name in ("forget05", "retain_perturbed", "real_authors", "world_facts", "holdout05"):
        write_rows(folder / "tofu" / f"{name}.jsonl", asked)
    return folder


def run_commands(example: Example) -> None:
    """Run the `palu` commands of a shell example; the others must be known to run elsewhere."""
    for line in example.parsed.replace("\\\n", " ").splitlines():
        command = line.partition(" #")[0].strip()
        if command.startswith("palu "):
            result = CliRunner().invoke(app, shlex.split(command)[1:], catch_exceptions=False)
            assert result.exit_code == 0, f"{command}\n{result.output}"
        elif command.startswith("ACCELERATE_USE_CPU="):
            places = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
            subprocess.run(command, shell=True, check=True, env=os.environ | {"PATH": places, "PYTHONPATH": str(ROOT)})
        else:
            assert not command or command.startswith(ELSEWHERE), f"nothing runs {command!r}"


def write_yaml(example: Example) -> None:
    """Write a YAML example to the file that its first line names; a run from it need not come to its end here."""
    name = example.parsed.removeprefix("# ").partition(":")[0]
    Path(name).write_text(example.parsed + "max_steps: 2\n", encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_examples_run(page: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    # The runs of the examples give no epochs, and need not come to their end here.
    monkeypatch.setattr(PaluSettings, "total_steps", lambda self, steps_per_epoch: 2 * steps_per_epoch)
    if page.stem == "trainer":  # a model that is stored as nearly every Llama is
        LlamaForCausalLM.from_pretrained(folder / "my-llama", dtype="bfloat16").save_pretrained("my-llama")
    parsers = (PythonCodeBlockParser(), CodeBlockParser("sh", run_commands), CodeBlockParser("yaml", write_yaml))
    for example in Document.parse(str(page), *parsers).examples():
        example.evaluate()


def test_links_lead_to_files_and_each_result_is_cited() -> None:
    cited = set()
    others = ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "benchmarks/README.md")
    for page in [*PAGES, *(ROOT / name for name in others)]:
        links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8"))
        files = {(page.parent / link).resolve() for link in links if "://" not in link}
        assert not [(page.name, file) for file in files if not file.exists()]
        cited |= files
    assert {path for path in (ROOT / "benchmarks" / "results").iterdir() if path not in cited} == set()


def test_the_citation_names_the_version() -> None:
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert found["version"] == palu.__version__


def test_contributing_lists_the_folders_and_the_layers() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    listed = re.findall(r"^    (\S+)  +\S", text.partition("## Folders")[2].partition("## Layers")[0], re.MULTILINE)
    assert not [name for name in listed if not (ROOT / name).exists()]
    there = {path.name for path in (ROOT / "palu").iterdir() if path.is_dir() or path.suffix == ".py"}
    named = {Path(name).name for name in listed if name.startswith("palu/")}
    assert named == there - {"__pycache__", "__init__.py", "__main__.py"}

    contract = re.search(r"^layers = \[(.+?)\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL)
    block = re.search(r"(?:^    .+\n)+", text.partition("## Layers")[2], re.MULTILINE)
    assert contract is not None and block is not None
    layers = re.findall(r'"(.+)"', contract[1])
    assert [line.strip().replace(", ", " | ") for line in block[0].splitlines()] == layers
