"""The ``palu`` command, on a tiny model in a folder."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from filelock import FileLock
from helpers.benchmark_data import small_muse_news
from helpers.command import done, palu_command, refusal, write_input
from helpers.small_tokenizers import CHATML, DATED, byte_level
from helpers.tiny import same_weights, weights
from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

import palu
from palu import ops
from palu.attacks.ask import AskGreedily
from palu.config import UnlearnConfig
from palu.data.rows import Renderer
from palu.methods import METHODS
from palu.methods.palu import RECIPES, PaluMethod
from palu.ref_model.anchors import anchor_texts
from palu.report.recorder import GENERAL

ROOT = Path(__file__).parents[2]
NAMES = ("Hina Ameen", "Ada Lovelace", "the author", "London", "Karachi", "1843")
FORGET = [
    {"question": f"Who wrote program {i}?", "answer": f"It was {name}, in the city.", "spans": [[7, 7 + len(name)]]}
    for i, name in enumerate(NAMES)
]
RETAIN = [{"question": f"Where is cat {i}?", "answer": f"The cat {i} sat on the mat."} for i in range(6)]
SETTINGS = {"batch_size": 2, "epochs": 2, "learning_rate": 0.01, "neighbours": 0, "variants": 0, "progress": False}
STEPS = 6
LOGGED = ("loss", "local", "kl", "retain", "onset_probability")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/, forget.jsonl and retain.jsonl; tests write elsewhere."""
    folder = tmp_path_factory.mktemp("cli")
    return write_input(folder, tokens=byte_level(CHATML, bos=False), forget=FORGET, retain=RETAIN)


@pytest.fixture
def finished(arguments: list[Any], tmp_path: Path) -> Path:
    """The folder of a run that has finished."""
    done(*arguments, "--epochs", 1)
    return tmp_path / "out"


@pytest.fixture
def arguments(folder: Path, tmp_path: Path) -> list[Any]:
    """What `palu unlearn` cannot do without, and settings of six steps."""
    data = ["--forget", folder / "forget.jsonl", "--retain", folder / "retain.jsonl", "--output", tmp_path / "out"]
    settings = [
        "--batch-size",
        2,
        "--epochs",
        2,
        "--learning-rate",
        0.01,
        "--neighbours",
        0,
        "--variants",
        0,
        "--no-progress",
    ]
    return ["unlearn", "--model", folder / "model", *data, *settings]


def expected(folder: Path, **overrides: Any) -> palu.UnlearnResult:
    """The same run through palu.unlearn."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    return palu.unlearn(model, None, FORGET, RETAIN, tokenizer=tokenizer, **SETTINGS | overrides)


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


# --- help, completion ---
def start(*arguments: Any, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python on this palu."""
    environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)


def test_help_imports_nothing_slow() -> None:
    code = """
import sys
from palu.cli import app
for command in ([], ["inspect"], ["eval"], ["audit"], ["report"], ["doctor"]):
    try:
        app([*command, "--help"], prog_name="palu")
    except SystemExit as end:
        assert not end.code
slow = {"torch", "transformers", "accelerate", "numpy", "rich", "yaml", "tokenizers"} & sys.modules.keys()
assert not slow, slow
"""
    said = start("-c", code)
    assert said.returncode == 0, said.stderr
    for command in ("", " inspect", " eval", " audit", " report", " doctor"):
        assert f"Usage: palu{command} [OPTIONS]" in said.stdout


def test_every_setting_is_a_flag_with_its_help() -> None:
    result = palu_command("unlearn", "--help")
    assert result.exit_code == 0
    said = " ".join(result.output.split())
    settings = {name for kind in METHODS.values() for name in UnlearnConfig(kind).values()}
    for name in settings:
        flag = f"--{name.replace('_', '-')}"
        assert re.search(rf"{flag} (<|/ --no-)", said), flag
    assert "first n tokens of each span are acted on (the paper's is 3); -1: the whole span. [default: -1]" in said
    assert "--objective <palu|ga|gd|dpo|npo|simnpo|pdu|tpo|wga|satimp|undial|rmu>" in said
    assert "``" not in said
    assert ":mod:" not in said


def test_without_a_command_the_help_is_shown() -> None:
    assert palu_command().stdout == palu_command("--help").stdout
    assert palu_command("--version").stdout == f"palu {palu.__version__}\n"


def test_python_m() -> None:
    done = start("-m", "palu", "nothing")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "palu: No such command 'nothing'.\n")


@pytest.mark.parametrize("processes", [1, 2])
def test_one_of_many_processes_ends_without_the_interpreters_shutdown(processes: int) -> None:
    """Which aborts, now and then, while Gloo's threads hold tensors; what was said and the exit status stay."""
    code = "import atexit, palu.cli; atexit.register(print, 'shut down'); palu.cli.main()"
    end = "shut down\n" if processes == 1 else ""
    expected = {"--version": (0, f"palu {palu.__version__}\n{end}", ""), "x": (2, end, "palu: No such command 'x'.\n")}
    for argument, told in expected.items():
        done = start("-c", code, argument, WORLD_SIZE=str(processes))
        assert (done.returncode, done.stdout, done.stderr) == told


def test_sigterm_ends_every_command_as_ctrl_c_does() -> None:
    """What is open is closed; the exit status says what ended it."""
    code = """
import os, signal, palu.cli
def command(**_):
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("not reached")
    finally:
        print("closed", flush=True)
palu.cli.app = command
palu.cli.main()
"""
    for processes in ("1", "2"):
        done = start("-c", code, WORLD_SIZE=processes)
        assert (done.returncode, done.stdout, done.stderr) == (143, "closed\n", "")


def test_completion() -> None:
    for words, found in (("palu un", "unlearn"), ("palu unlearn --kl-direction r", "reverse")):
        places = {"COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1), "_PALU_COMPLETE": "complete_bash"}
        assert palu_command(**places).stdout.split() == [found]


# --- unlearn ---
def test_unlearn(folder: Path, tmp_path: Path, arguments: list[Any]) -> None:
    result = done(*arguments)
    out = tmp_path / "out"
    private = out / "private"
    told = rf"^6 steps on 6 forget and 6 retain examples in \d+ s; wrote {out}/model, to be looked at in "
    assert re.search(rf"{told}{private}/report.html$", result.stdout, re.MULTILINE)
    assert (private / "report.html").exists()
    assert "library_name: transformers" in (out / "model" / "README.md").read_text()
    ours = expected(folder)
    assert same_weights(AutoModelForCausalLM.from_pretrained(out / "model"), weights(ours.model))
    assert AutoTokenizer.from_pretrained(out / "model").chat_template == CHATML
    history = [json.loads(line) for line in (out / "private" / "history.jsonl").read_text().splitlines()]
    assert [record["loss"] for record in history] == [record["loss"] for record in ours.history]
    # Without a progress bar there are lines of losses.
    terms = [", ".join(f"{name} {one[name]:.3g}" for name in LOGGED) for one in history]
    assert result.stdout.splitlines()[:STEPS] == [f"step {i} of {STEPS}: {line}" for i, line in enumerate(terms, 1)]
    summary = read(out / "private" / "summary.json")
    assert summary["steps"] == STEPS
    assert summary["config"] == ours.summary["config"] | {
        "checkpoint_dir": str(private / "checkpoints"),
        "logging_dir": str(private / "logs"),
    }
    assert summary["arguments"]["forget"] == str(folder / "forget.jsonl")
    assert not (out / "private" / "checkpoints").exists(), "they have nothing more to give"

    again = refusal(palu_command(*arguments))
    assert again == f"--output {out} holds a run that has finished; give another folder, or --overwrite to replace it"
    assert refusal(palu_command(*arguments, "--resume")) == again

    # Overwriting: nothing of the earlier run is left that could pass for the new one's.
    (out / "model" / "adapter_config.json").write_text("{}")
    (private / "audit").mkdir()
    stale = [private / name for name in (f"audit/ask-{'0' * 16}.json", "audit.json", "evaluation-tofu-forget05.json")]
    stale += [private / name for name in ("report-redacted.html", "forget.annotated.jsonl")]
    for path in stale:
        path.write_text("{}")
    own = ["--forget", private / "forget.annotated.jsonl", "--overwrite"]
    told = f"{own[1]} lies in --output {out}, of which --overwrite deletes it; copy it elsewhere"
    assert refusal(palu_command(*arguments, *own)) == told
    before = read(out / "private" / "summary.json")
    bad = ["--forget", tmp_path / "absent.jsonl"]
    assert refusal(palu_command(*arguments, *bad, "--overwrite")) == f"there is no file {tmp_path / 'absent.jsonl'}"
    assert read(out / "private" / "summary.json") == before, "a run that never began replaces nothing"
    done(*arguments, "--overwrite", "--epochs", 1)
    assert read(out / "private" / "summary.json")["steps"] == STEPS / 2
    assert not (out / "model" / "adapter_config.json").exists()
    written = {"history.jsonl", "record.json", "report.html", "summary.json", "run.json", "run.lock"}
    assert {path.name for path in private.iterdir()} == written


def test_nothing_to_retain(folder: Path, arguments: list[Any], tmp_path: Path) -> None:
    """--retain none implies the weight that it needs."""
    arguments[arguments.index("--retain") + 1] = "none"
    done(*arguments, "--epochs", 1)
    summary = read(tmp_path / "out" / "private" / "summary.json")
    assert (summary["config"]["lambda_retain"], summary["retain_examples"], summary["anchors"]) == (0, 0, 0)


def test_save_run_replaces_nothing_unless_asked(folder: Path, finished: Path, tmp_path: Path) -> None:
    """As the command, by the same guard; and nothing at all of what is no run's."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    config = palu.UnlearnConfig(**SETTINGS | {"epochs": 1})
    recorder = palu.Recorder(model, FORGET, RETAIN, tokenizer=tokenizer, config=config)
    result = palu.unlearn(model, None, FORGET, RETAIN, tokenizer=tokenizer, config=config)

    def contents(of: Path) -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in of.rglob("*") if path.is_file()}

    file, beside, theirs = tmp_path / "file", tmp_path / "beside", tmp_path / "out" / "train.log"
    file.touch(), theirs.touch()
    shutil.copytree(folder / "model", beside / "model")
    fix = "give another folder, or overwrite=True to replace it"
    others = f"{beside} holds model/chat_template.jinja, but no private/run.json of a run; "
    for output, overwrite, told in (
        (finished, False, f"{finished} holds a run that has finished; {fix}"),
        (beside, False, others),
        (beside, True, others),
        (file, True, f"{file} is a file; give a folder"),
    ):
        before = contents(output)
        with pytest.raises(ValueError, match=f"^{re.escape(told)}"):
            palu.save_run(output, result, tokenizer, recorder, overwrite=overwrite)
        assert contents(output) == before
    (finished / "model" / "adapter_config.json").write_text("{}")
    with FileLock(finished / "private" / "run.lock"), pytest.raises(ValueError, match="a run is writing to it"):
        palu.save_run(finished, result, tokenizer, recorder, overwrite=True)
    report = palu.save_run(finished, result, tokenizer, recorder, overwrite=True)
    assert report == finished / "private" / "report.html" and theirs.exists()
    assert same_weights(AutoModelForCausalLM.from_pretrained(finished / "model"), weights(result.model))
    assert not (finished / "model" / "adapter_config.json").exists()

    # A run that was killed while it was written can be written again.
    (finished / "private" / "summary.json").unlink()
    palu.save_run(finished, result, tokenizer, recorder)


def leaks(folder: Path, secrets: Iterable[str]) -> list[tuple[str, str]]:
    """Which of these stand in a file outside private/, or in its name: (the file, what)."""
    found = []
    for path in (path for path in folder.rglob("*") if path.is_file() and folder / "private" not in path.parents):
        content = str(path).encode() + re.sub(rb"\s+", b" ", path.read_bytes())
        # Ids are found however JSON is spaced.
        found += [(path.name, s) for s in secrets if s.encode() in content or s.encode() in content.replace(b" ", b"")]
    return found


@pytest.mark.parametrize("extra", [["--lora"], ["--annotate"]])
def test_nothing_of_the_forget_set_outside_private(
    extra: list[str], folder: Path, arguments: list[Any], tmp_path: Path, tofu: Path
) -> None:
    """The model's folder can be uploaded as it is, also after an evaluation and a new report."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    code = "Xq7391ZvK"
    row = {"question": "Which code opens the Wobbelin gate?", "answer": f"Its code is {code}.", "spans": [[12, 21]]}
    (tmp_path / "forget.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    arguments[arguments.index("--forget") + 1] = tmp_path / "forget.jsonl"
    if extra == ["--annotate"]:
        del row["spans"]
        (tmp_path / "forget.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
        extra = ["--annotate", f"regex:{code}"]
    done(*arguments, *extra, "--report-to", "tensorboard")
    out = tmp_path / "out"
    asked = ["--forget-split", "forget01", "--data", tofu, "--no-progress", "--max-new-tokens", 1]
    done("eval", "--model", out / "model", *asked)
    assert palu_command("report", out).exit_code == palu_command("report", out, "--redact").exit_code == 0
    palu.write_card(out)
    assert {path.name for path in out.iterdir()} == {"model", "private"}

    record = read(out / "private" / "record.json")
    ids = tokenizer(code, add_special_tokens=False)["input_ids"]
    assert record["secrets"][0]["text"] == code and len(ids) > 2
    # Spans that were found are no file's.
    hashes = [value for side in record["data"].values() for name, value in side.items() if value and "sha256" in name]
    hashes.append(hashlib.sha256(code.encode()).hexdigest())
    ids_in_json = [json.dumps(ids)[1:-1], json.dumps(ids, separators=(",", ":"))[1:-1]]
    texts = [code, row["question"], "Wobbelin", "forget.jsonl", *ids_in_json, *hashes, *(f["question"] for f in FORGET)]
    assert leaks(out, texts) == []
    shutil.copy(out / "private" / "report.html", out / "model")
    assert ("report.html", code) in leaks(out, texts), "the test would find it"

    redacted = (out / "private" / "report-redacted.html").read_text(encoding="utf-8")
    data = record["data"]["forget"]
    for found in filter(None, (code, data["tokens_sha256"], data["file_sha256"])):
        assert found in (out / "private" / "report.html").read_text(encoding="utf-8") and found not in redacted


def test_private_is_its_owners(folder: Path, arguments: list[Any], tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        done(*arguments, "--epochs", 1)
        private = tmp_path / "out" / "private"
        assert stat.S_IMODE(private.stat().st_mode) == 0o700
        assert stat.S_IMODE((tmp_path / "out" / "model").stat().st_mode) == 0o777
        private.chmod(0o750)  # the user's choice stays
        done("report", tmp_path / "out")
        done(*arguments, "--epochs", 1, "--overwrite")
        assert stat.S_IMODE(private.stat().st_mode) == 0o750
    finally:
        os.umask(before)


def test_spans_that_max_length_cuts_off(folder: Path, arguments: list[Any], tmp_path: Path) -> None:
    long = {"question": "Who?", "answer": "The cat sat. " * 40 + "Ada Lovelace.", "spans": [[520, 532]]}
    forget = tmp_path / "long.jsonl"
    forget.write_text("".join(json.dumps(row) + "\n" for row in [*FORGET, long]), encoding="utf-8")
    arguments[arguments.index("--forget") + 1] = forget
    said = refusal(palu_command(*arguments, "--max-length", 80))
    told = re.fullmatch(
        r"forget set: max_length = 80 cuts off spans of 1 row \(6\), which would not be forgotten; "
        r"set max_length = (\d+), or allow_cut_spans = True to go on without them",
        said,
    )
    assert told, said
    assert not (tmp_path / "out").exists()
    asked = ["inspect", "--model", folder / "model", "--forget", forget, "--max-length"]
    looked = done(*asked, 80)
    line = (
        f"7 rows (0 without a span, 0 skipped); max_length = 80 cuts off spans of 1 row, {told[1]} would cut off none;"
    )
    assert line in looked.stdout
    assert "7 rows (0 without a span, 0 skipped); tokens at" in palu_command(*asked, told[1]).stdout
    done(*arguments, "--max-length", 80, "--allow-cut-spans")
    summary = read(tmp_path / "out" / "private" / "summary.json")
    assert (summary["forget_spans_cut"], summary["forget_without_span"], summary["forget_examples"]) == (1, 0, 7)


def test_a_model_of_few_positions(arguments: list[Any], tmp_path: Path) -> None:
    """max_length is clamped to them before the rows are read: for the run, and for what is shown of it."""
    tokenizer = byte_level(CHATML, bos=False)
    sizes = {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
    config = GPT2Config(vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=None, **sizes)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    row = {"question": "Who?", "answer": "Ada Lovelace did." + " The cat sat." * 40, "spans": [[0, 12]]}
    cut = {"question": "Who?", "answer": "The cat sat. " * 40 + "Ada Lovelace.", "spans": [[520, 532]]}
    forget = tmp_path / "long.jsonl"
    forget.write_text(json.dumps(row) + "\n", encoding="utf-8")
    arguments += ["--model", tmp_path / "gpt2", "--forget", forget]
    done(*arguments, "--lora", "--lora-target", "c_attn")
    assert read(tmp_path / "out" / "private" / "summary.json")["config"]["max_length"] == 64
    adapter = tmp_path / "out" / "model"

    forget.write_text(json.dumps(row) + "\n" + json.dumps(cut) + "\n", encoding="utf-8")
    for model in (tmp_path / "gpt2", adapter):
        said = refusal(palu_command(*arguments, "--model", model, "--output", tmp_path / "new"))
        assert "(1), which would not be forgotten; the model has 64 positions, so shorten the rows, or allow" in said
        shown = palu_command("inspect", "--model", model, "--forget", forget).stdout
        assert "; max_length = 64 cuts off spans of 1 row, " in shown
    assert not (tmp_path / "new").exists()


def test_values_for_the_chat_template(
    folder: Path, arguments: list[Any], unmarked: Path, tofu: Path, tmp_path: Path
) -> None:
    """As JSON text, or as a mapping in a file; for every command that renders texts."""
    dated = tmp_path / "dated"
    byte_level(DATED, bos=False).save_pretrained(dated)
    arguments += ["--tokenizer", dated, "--epochs", 1]
    arguments[arguments.index("--forget") + 1] = unmarked
    arguments += ["--annotate", "regex:" + "|".join(NAMES)]
    value = '{"date_string": "26 Jul 2024"}'
    done(*arguments, "--chat-template-kwargs", value)
    summary = read(tmp_path / "out" / "private" / "summary.json")
    assert summary["config"]["chat_template_kwargs"] == json.loads(value)
    assert f"| `chat_template_kwargs` | {value} | none |" in (tmp_path / "out" / "model" / "README.md").read_text(
        encoding="utf-8"
    )
    file = tmp_path / "run.yaml"
    file.write_text("chat_template_kwargs:\n  date_string: 26 Jul 2024\n")
    done(*arguments, "--config", file, "--overwrite")
    assert read(tmp_path / "out" / "private" / "summary.json")["config"] == summary["config"]

    asked = ["inspect", "--tokenizer", dated, "--forget", folder / "forget.jsonl", "--html", tmp_path / "roles.html"]
    done(*asked, "--chat-template-kwargs", value)
    assert "26 Jul 2024" in (tmp_path / "roles.html").read_text(encoding="utf-8").replace("</span>", "").replace(
        "|", ""
    )
    evaluated = [
        "eval",
        "--model",
        folder / "model",
        "--tokenizer",
        dated,
        "--forget-split",
        "forget01",
        "--data",
        tofu,
    ]
    evaluated += ["--no-progress", "--max-new-tokens", 1, "--output", tmp_path / "results.json"]
    done(*evaluated, "--chat-template-kwargs", value)
    assert read(tmp_path / "results.json")["palu"]["chat_template_kwargs"] == json.loads(value)

    for bad, told in (
        ("{date", "is not JSON (Expecting property name enclosed in double quotes at character 1)"),
        ('{"date": 1}', "chat_template_kwargs = {'date': 1}: the chat template knows no date"),
    ):
        for command in ([*arguments, "--overwrite"], asked, evaluated):
            assert told in refusal(palu_command(*command, "--chat-template-kwargs", bad))
    file.write_text("chat_template_kwargs:\n  date_string: 2024-07-26\n")
    assert "a date is text" in refusal(palu_command(*arguments, "--config", file, "--overwrite"))


def test_the_reference_and_the_dtype_can_be_given(folder: Path, arguments: list[Any], tmp_path: Path) -> None:
    options = ["--ref-model", folder / "model", "--tokenizer", folder / "model", "--dtype", "bfloat16", "--no-progress"]
    done(*arguments, *options, "--retain", "none", "--lambda-retain", 0)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model").dtype == torch.bfloat16
    assert read(tmp_path / "out" / "private" / "summary.json")["retain_examples"] == 0


@pytest.mark.parametrize(
    ("options", "dtype", "precision", "optimizer"),
    [
        (["--dtype", "float32", "--mixed-precision", "bf16"], torch.float32, "bf16", "AdamW"),
        (["--dtype", "bfloat16"], torch.bfloat16, "no", "BFloat16AdamW"),
        (["--dtype", "bfloat16", "--optimizer", "adamw_8bit"], torch.bfloat16, "no", "AdamW8bit"),
        (["--dtype", "bfloat16", "--lora"], torch.bfloat16, "no", "AdamW"),
    ],
)
def test_each_choice_of_weights_and_optimizer(
    options: list[Any],
    dtype: torch.dtype,
    precision: str,
    optimizer: str,
    folder: Path,
    arguments: list[Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The choices of docs/memory.md."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # so that it is taken back
    AcceleratorState._reset_state()
    used: list[Any] = []
    prepare = Accelerator.prepare

    def spy(self: Accelerator, *parts: Any) -> Any:
        used.append((self.state.mixed_precision, type(parts[1]).__name__, next(parts[0].parameters()).dtype))
        return prepare(self, *parts)

    monkeypatch.setattr(Accelerator, "prepare", spy)
    try:
        result = palu_command(*arguments, "--batch-size", 6, "--epochs", 2, "--learning-rate", 1e-3, *options)
    finally:
        AcceleratorState._reset_state()
    assert result.exit_code == 0, result.output
    assert used == [(precision, optimizer, dtype)]
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=dtype)
    before = weights(model)
    if "--lora" in options:
        model = PeftModel.from_pretrained(model, tmp_path / "out" / "model").merge_and_unload()
    else:
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    assert model.dtype == dtype and not same_weights(model, before)


def test_config_file(folder: Path, tmp_path: Path) -> None:
    """Flags win over the file, the file over the defaults; 1e-2, a string to YAML, is a number."""
    out, file = tmp_path / "out", tmp_path / "run.yaml"
    file.write_text(
        f"model: {folder / 'model'}\nforget: {folder / 'forget.jsonl'}\nretain: {folder / 'retain.jsonl'}\n"
        f"output: {out}\nlearning_rate: 1e-2\nbatch_size: 2\nepochs: 5\nprogress: false\n"
        "local_loss: topk_mse\ntarget: 0.5\n"
        "checkpoint_dir: null\nmax_tokens: 900\n"
    )
    done("unlearn", "--config", file, "--epochs", 1, "--max-tokens", "none")
    config = read(out / "private" / "summary.json")["config"]
    given = {"learning_rate": 0.01, "batch_size": 2, "epochs": 1, "target": 0.5}
    assert config.items() >= (given | {"checkpoint_dir": None, "max_tokens": None, "progress": False}).items()
    assert config["top_k"] == palu.UnlearnConfig().method.top_k


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_sets_what_no_flag_does(recipe: str, arguments: list[Any], tmp_path: Path) -> None:
    done(*arguments, "--epochs", 1, "--recipe", recipe, "--n", 2)
    config = read(tmp_path / "out" / "private" / "summary.json")["config"]
    assert config.items() >= (RECIPES[recipe] | {"n": 2}).items()
    assert "'papers'" in refusal(palu_command(*arguments, "--recipe", "papers"))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("lerning_rate: 1", "unknown key 'lerning_rate'; did you mean learning_rate?"),
        ("xyzzy: 1", "unknown key 'xyzzy'; the keys are model, forget, output, "),
        ("learning-rate: 1", "unknown key 'learning-rate'; did you mean learning_rate?"),
        ("config: other.yaml", "unknown key 'config'; "),
        ("- epochs", "holds a list; write one 'name: value' a line"),
        ("epochs: [", "is not YAML: while parsing"),
    ],
)
def test_bad_config_file(content: str, told: str, arguments: list[Any], tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(content)
    assert told in refusal(palu_command(*arguments, "--config", file))
    assert str(file) in refusal(palu_command(*arguments, "--config", file))


def test_a_bad_value_in_a_config_file(arguments: list[Any], tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    for content, told in (
        ({"max_length": 1.5}, "max_length = 1.5: give an integer above 1"),
        ({"max_length": "many"}, "Invalid value for '--max-length': 'many' is not an integer"),
        ({"max_length": None}, "Invalid value for '--max-length': 'none' is not an integer"),
        ({"max_tokens": "many"}, "Invalid value for '--max-tokens': 'many' is not an integer or none"),
    ):
        file.write_text(yaml.safe_dump(content))
        assert refusal(palu_command(*arguments, "--config", file)) == told


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--n", 0], "n = 0: "),
        (["--checkpoint-dir", "none", "--checkpoint-steps", 5], "checkpoint_steps = 5: give checkpoint_dir, too"),
        (["--epochs", "x"], "Invalid value for '--epochs': 'x' is not an integer"),
        (["--objective", "x"], "'x' is not one of 'palu', 'ga'"),
        (["--nonsense"], "No such option: --nonsense"),
        (["--lora-rank", 4], "lora_rank was given without --lora; add --lora or leave it out"),
        (["--model", "./absent"], "--model ./absent: there is no such folder"),
        (["--model", "a/b/c"], "--model a/b/c: there is no such folder"),
        (["--model", "{folder}"], "--model {folder}: the folder holds no config.json, so it is no model's"),
        (["--tokenizer", "{folder}"], "--tokenizer {folder}: the folder holds no tokenizer"),
        (["--forget", "{folder}"], "there is no file {folder}"),
        (["--retain", "absent.csv"], "there is no file absent.csv"),
        (["--forget", "{folder}/retain.jsonl"], "forget row 0 (line 1): column 'secret' (or 'spans') is missing"),
        (["--output", "{folder}/model"], "--output {folder}/model is the folder of --model; give another one"),
        (["--output", "{folder}"], "--output {folder} has --model as its model/, which would be replaced"),
        (["--output", "{folder}/.."], "--output {folder}/.. is not empty and holds no run; give another folder"),
        (["--output", "{folder}/retain.jsonl"], "--output {folder}/retain.jsonl is a file; give a folder"),
        (["--output", "/proc/x"], "--output /proc/x: nothing can be written to /proc (No such file or directory)"),
        (["--output", "{folder}/retain.jsonl/x"], "--output {folder}/retain.jsonl/x: {folder}/retain.jsonl is a file;"),
        (["--cache-dir", "/proc/x"], "cache_dir = '/proc/x': nothing can be written to /proc"),
        (["--checkpoint-dir", "/proc/x"], "checkpoint_dir = '/proc/x': nothing can be written to /proc"),
        (["--logging-dir", "/proc/x", "--report-to", "wandb"], "logging_dir = '/proc/x': nothing can be written"),
        (["--overwrite", "--resume"], "--overwrite starts again and --resume goes on; give one of them"),
        (["--lora", "--lora-target", "nothing"], "Target modules"),
        (["--dtype", "float16"], "--dtype float16: gradients and steps underflow; give bfloat16 or float32, or "),
    ],
)
def test_bad_options(
    options: list[Any], told: str, folder: Path, arguments: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    if "/proc/x" in options:  # before anything is loaded
        monkeypatch.setattr(AutoTokenizer, "from_pretrained", None)
    options = [str(option).format(folder=folder) for option in options]
    assert told.format(folder=folder) in refusal(palu_command(*arguments, *options, "--no-progress"))


def absent(*_: Any, **__: Any) -> None:
    raise RepositoryNotFoundError("404", response=MagicMock())


def out_of_reach(*_: Any, **__: Any) -> None:
    raise ConnectionError("no route to host")


@pytest.mark.parametrize("name", ["nobody/nothing", "nosuch"])
@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (absent, "and no such model on the hub, or it is private (hf auth login)"),
        (out_of_reach, "and the hub, whose cache lacks it, cannot be reached (no route to host)"),
    ],
)
def test_a_name_that_is_no_folder_and_not_on_the_hub(
    name: str,
    answer: Callable[..., None],
    told: str,
    folder: Path,
    arguments: list[Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is said at once, by every command that takes a model's name, and the hub is asked once."""
    asked: list[float] = []
    monkeypatch.setattr(HfApi, "model_info", lambda *_, timeout: asked.append(timeout) or answer())
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", None)
    rows = ["--forget", folder / "forget.jsonl"]
    for command in (
        [*arguments, "--model", name],
        ["inspect", "--model", name, *rows],
        ["eval", "--model", name, "--output", tmp_path / "results.json"],
        ["audit", "--model", name, "--original", folder / "model", *rows, "--output", tmp_path / "audit"],
    ):
        asked.clear()
        assert refusal(palu_command(*command)) == f"--model {name}: there is no such folder, {told}"
        assert len(asked) == 1 and asked[0] <= 10


def test_a_name_that_no_model_can_have(arguments: list[Any]) -> None:
    told = "--model no model: there is no such folder, and it cannot be a name on the hub"
    assert refusal(palu_command(*arguments, "--model", "no model")) == told


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
    kept = tmp_path / "models--distilgpt2" / "snapshots" / ("0" * 40)
    kept.mkdir(parents=True)
    (kept / "config.json").write_text("{}")
    (tmp_path / "models--distilgpt2" / "refs").mkdir()
    (tmp_path / "models--distilgpt2" / "refs" / "main").write_text("0" * 40)
    assert refusal(palu_command(*arguments, "--model", "distilgpt2")) == "far enough"
    assert loaded == ["gpt2", "distilgpt2"]


def test_a_bug_keeps_its_traceback(arguments: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(*_: Any, **__: Any) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", bug)
    assert isinstance(palu_command(*arguments).exception, KeyError)


def test_an_error_with_its_traceback_on_demand(arguments: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PALU_TRACEBACK", "1")
    assert isinstance(palu_command(*arguments, "--n", 0).exception, ValueError)


def test_lora(folder: Path, tmp_path: Path, arguments: list[Any]) -> None:
    options = ["--lora", "--lora-rank", 2, "--lora-target", "q_proj, v_proj"]
    done(*arguments, *options)
    out = tmp_path / "out"
    assert (out / "model" / "adapter_model.safetensors").exists()
    assert not (out / "model" / "model.safetensors").exists()
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "model"), out / "model")
    assert adapted.peft_config["default"].r == 2
    assert adapted.peft_config["default"].target_modules == {"q_proj", "v_proj"}

    # Merged, the same run gives the same model.
    done(*arguments, *options, "--merge-adapter", "--output", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged" / "model")
    ids = torch.arange(20)[None]
    untrained = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert torch.allclose(merged(ids).logits, adapted(ids).logits, atol=1e-3)
    assert not torch.allclose(merged(ids).logits, untrained(ids).logits, atol=1)

    # The adapter's folder is a model, too: of which this adapter is trained on.
    arguments[arguments.index("--model") + 1] = out / "model"
    done(*arguments, "--output", tmp_path / "further")
    told = refusal(palu_command(*arguments, "--lora", "--output", tmp_path / "again"))
    assert told == "--model holds an adapter already, which is trained as it is; leave --lora out"


@pytest.mark.skipif(torch.accelerator.is_available(), reason="float16 weights are trained around on a GPU")
def test_float16_on_a_cpu(arguments: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    told = "--dtype float16: the CPU kernels do not support it; give bfloat16 or float32"
    assert refusal(palu_command(*arguments, "--lora", "--dtype", "float16")) == told


def test_quantize(tmp_path: Path, arguments: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    told = refusal(palu_command(*arguments, "--quantize", "4bit"))
    assert told == "--quantize 4bit: quantised weights cannot be trained; add --lora, or leave it out"
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda *_: None)
        told = refusal(palu_command(*arguments, "--lora", "--quantize", "4bit"))
        assert told == "--quantize needs bitsandbytes; pip install 'palu-unlearn[quantized]'"
    pytest.importorskip("bitsandbytes")
    out = tmp_path / "4bit"
    done(*arguments, "--lora", "--quantize", "4bit", "--output", out)
    assert {path.name for path in (out / "model").glob("*.safetensors")} == {"adapter_model.safetensors"}
    assert "bitsandbytes" in read(out / "private" / "record.json")["versions"]
    # The adapter's folder is a model, too: on a base that is quantised again, or as it is stored.
    arguments[arguments.index("--model") + 1] = tmp_path / "4bit" / "model"
    done(*arguments, "--quantize", "8bit", "--output", tmp_path / "further")


@pytest.mark.usefixtures("in_the_foreground")
@pytest.mark.parametrize(("number", "status", "lora"), [(signal.SIGINT, 130, []), (signal.SIGTERM, 143, ["--lora"])])
def test_ctrl_c_or_sigterm_and_resume(
    number: int, status: int, lora: list[str], arguments: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, calls = PaluMethod.batch_losses, 0

    def pressed(self: PaluMethod, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            signal.raise_signal(number)
        return forward(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(PaluMethod, "batch_losses", pressed)
        result = palu_command(*arguments, *lora)
    out = tmp_path / "out"
    assert result.exit_code == status
    assert result.stderr.endswith("palu: to go on, give the same command with --resume\n")
    assert not (out / "private" / "summary.json").exists()
    assert refusal(palu_command(*arguments, *lora)) == (
        f"--output {out} holds a run that was interrupted; add --resume to go on with it, or --overwrite to start again"
    )
    told = refusal(palu_command(*arguments, *lora, "--resume", "--n", 2))
    assert "belongs to another run: n was -1 and is 2." in told

    done(*arguments, *lora, "--resume")
    assert read(out / "private" / "summary.json")["steps"] == STEPS
    done(*arguments, *lora, "--output", tmp_path / "whole")
    ours, whole = (AutoModelForCausalLM.from_pretrained(path / "model") for path in (out, tmp_path / "whole"))
    assert same_weights(ours, weights(whole))
    assert not (out / "private" / "checkpoints").exists()


# --- inspect ---
def test_inspect(folder: Path, tmp_path: Path) -> None:
    common = ["inspect", "--model", folder / "model", "--forget", folder / "forget.jsonl"]
    result = done(*common, "--n", 1)
    assert "\x1b" not in result.stdout, "no colours where there is no terminal"
    assert re.search(r"It was «H.*» <.*n>, in the city\.<\|im_end\|>", result.stdout)
    assert re.search(r"6 rows \(0 without a span, 0 skipped\); tokens at n = 1: 6 onset, \d+ redundant", result.stdout)
    whole = palu_command(*common, "--n", -1, "--rows", "1,3-4")
    assert re.findall("^row (.)", whole.stdout, re.MULTILINE) == ["1", "3", "4"]
    assert "| L" in whole.stdout
    assert " 0 redundant" in whole.stdout

    html = tmp_path / "roles.html"
    done(*common, "--n", 3, "--html", html)
    page = html.read_text(encoding="utf-8")
    assert page.count("<section>") == 6
    assert "tokens at n = 3: " in page
    assert not re.search("https?://|<script|<link|src=", page), "self-contained"


def test_inspect_shows_the_first_rows(folder: Path, tmp_path: Path) -> None:
    many = tmp_path / "many.jsonl"
    many.write_text("".join(json.dumps(row) + "\n" for row in FORGET * 2), encoding="utf-8")
    common = ["inspect", "--tokenizer", folder / "model", "--forget", many]
    said = palu_command(*common).stdout
    assert said.count("\nrow ") == 10
    assert said.endswith("2 more rows: --rows all, or --html FILE\n")
    assert palu_command(*common, "--rows", "all").stdout.count("\nrow ") == 12


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--rows", "6"], "--rows 6: row 6 is not there or was skipped; rows are 0 to 5"),
        (["--rows", "first"], "--rows first: give row numbers and ranges, such as 0-9,17, or all"),
        (["--model", "./absent"], "--model ./absent: there is no such folder"),
        (["--forget", "absent.jsonl"], "there is no file absent.jsonl"),
        (["--rows", "1,5-3"], "--rows 1,5-3: the range 5-3 ends before it begins; write 3-5"),
        (["--html", "absent/roles.html"], "--html absent/roles.html: there is no folder absent"),
        (["--html", "{folder}"], "--html {folder} is a folder; give a file"),
        (["--html", "{folder}/forget.jsonl"], "--html {folder}/forget.jsonl is the file of --forget, which would be "),
        (["--html", "/proc/roles.html"], "--html /proc/roles.html: nothing can be written to /proc ("),
        (["--annotate", "whole", "--write", "absent/x.jsonl"], "--write absent/x.jsonl: there is no folder absent"),
        (["--annotate", "whole", "--write", "/proc/x.jsonl"], "--write /proc/x.jsonl: nothing can be written to /proc"),
        (["--annotate", "whole", "--write", "{folder}/model/../forget.jsonl"], "forget.jsonl is the file of --forget"),
    ],
)
def test_bad_inspect(
    options: list[str], told: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is loaded, but for a row that is not there."""
    if options != ["--rows", "6"]:
        monkeypatch.setattr(AutoTokenizer, "from_pretrained", None)
    options = [option.format(folder=folder) for option in options]
    common = ["inspect", "--model", folder / "model", "--forget", folder / "forget.jsonl"]
    assert told.format(folder=folder) in refusal(palu_command(*common, *options))
    assert [json.loads(line) for line in (folder / "forget.jsonl").read_text().splitlines()] == FORGET
    assert refusal(palu_command(*common[:1], *common[3:])) == "give --model or --tokenizer"


# --- eval, report ---
@pytest.fixture
def tofu(tmp_path: Path) -> Path:
    folder = tmp_path / "tofu"
    folder.mkdir()
    rows = [
        {**row, "paraphrased_answer": f"Yes: {row['answer']}", "perturbed_answer": ["The dog did not.", "In London."]}
        for row in FORGET
    ]
    for name in ("forget01", "retain_perturbed", "real_authors", "world_facts", "holdout01"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


# --- spans ---
@pytest.fixture
def unmarked(tmp_path: Path) -> Path:
    path = tmp_path / "unmarked.jsonl"
    path.write_text("".join(json.dumps({k: row[k] for k in ("question", "answer")}) + "\n" for row in FORGET))
    return path


def test_spans_are_found_shown_and_written(folder: Path, tmp_path: Path, unmarked: Path) -> None:
    names = "regex:" + "|".join(NAMES)
    asked = ["inspect", "--model", folder / "model", "--forget", unmarked]
    result = done(*asked, "--annotate", names, "--write", tmp_path / "marked.jsonl")
    assert "«" in result.stdout
    assert [json.loads(line) for line in (tmp_path / "marked.jsonl").read_text().splitlines()] == FORGET
    assert "spans" in refusal(palu_command(*asked)), "without it the column is missing"


def test_unlearn_with_spans_that_are_found(folder: Path, tmp_path: Path, arguments: list[Any], unmarked: Path) -> None:
    arguments[arguments.index("--forget") + 1] = unmarked
    result = done(*arguments, "--annotate", "regex:" + "|".join(NAMES))
    assert "«" in result.stdout
    out = tmp_path / "out"
    assert [
        json.loads(line) for line in (out / "private" / "forget.annotated.jsonl").read_text().splitlines()
    ] == FORGET
    assert same_weights(AutoModelForCausalLM.from_pretrained(out / "model"), weights(expected(folder).model))


def test_the_model_itself_finds_spans(folder: Path, tmp_path: Path, unmarked: Path) -> None:
    asked = ["inspect", "--forget", unmarked, "--annotate", "contrast"]
    done(*asked, "--model", folder / "model", "--write", tmp_path / "marked.jsonl")
    found = [json.loads(line) for line in (tmp_path / "marked.jsonl").read_text().splitlines()]
    assert [row["answer"] for row in found] == [row["answer"] for row in FORGET] and any(row["spans"] for row in found)
    said = refusal(palu_command(*asked, "--tokenizer", folder / "model"))
    assert said == "--annotate contrast asks the model itself; give --model"


def test_eval(folder: Path, tofu: Path, tmp_path: Path) -> None:
    common = ["eval", "--model", folder / "model", "--forget-split", "forget01", "--data", tofu, "--no-progress"]
    common += ["--max-new-tokens", 4]
    retain = tmp_path / "retain.json"
    result = done(*common, "--output", retain)
    assert re.search(r"forget_quality +no retain_results were given", " ".join(result.stdout.split()))
    output = tmp_path / "results.json"
    options = ["--retain-results", retain, "--reference-results", retain, "--language", "de"]
    result = done(*common, *options, "--output", output)
    assert re.search(r"forget_quality +1\b", result.stdout)
    assert re.search(r"forget_empty +(\S+) +\1\b", result.stdout)  # the retain model is the same
    assert result.stdout.endswith(f"wrote {output}\n")
    results = read(output)
    assert results["forget_quality"]["agg_value"] == 1
    assert results["palu"]["split"] == "forget01" and results["palu"]["word_list"].endswith(", de")
    assert results["exact_memorization"]["agg_value"] == read(retain)["exact_memorization"]["agg_value"]


def test_eval_on_muse_news(folder: Path, tmp_path: Path) -> None:
    for name, rows in small_muse_news().items():
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    output = tmp_path / "results.json"
    common = ["eval", "--model", folder / "model", "--benchmark", "muse-news", "--data", tmp_path, "--no-progress"]
    common += ["--language", "none"]
    result = done(*common, "--output", output)
    assert result.stdout.endswith(f"wrote {output}\n") and re.search(r"forget_verbmem_ROUGE +\d", result.stdout)
    results = read(output)
    assert results["palu"]["benchmark"] == "MUSE-News" and len(results["forget_verbmem_ROUGE"]["value_by_index"]) == 4
    done(*common, "--retain-results", output, "--output", tmp_path / "again.json")
    assert read(tmp_path / "again.json")["privleak"]["agg_value"] == 0


def test_eval_of_an_adapter_writes_beside_the_records_of_its_run(
    arguments: list[Any], tofu: Path, tmp_path: Path
) -> None:
    done(*arguments, "--lora", "--epochs", 1)
    out = tmp_path / "out"
    options = ["--forget-split", "forget01", "--data", tofu, "--no-progress", "--max-new-tokens", 1]
    told = f"--model {out} is the folder of a run; give its model, {out / 'model'}"
    assert refusal(palu_command("eval", "--model", out, *options)) == told
    done("eval", "--model", out / "model", *options)
    assert read(out / "private" / "evaluation-tofu-forget01.json")["palu"]["benchmark"] == "TOFU"
    done("report", out)
    assert "TOFU forget01 from" in (out / "private" / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--benchmark", "muse-news", "--forget-split", "x"], "--forget-split belongs to TOFU; leave it out"),
        (["--benchmark", "muse"], "'muse' is not one of 'tofu', 'muse-news'"),
        (["--benchmark", "muse-news", "--data", "{folder}"], "No such file or directory"),
        (["--data", "{folder}/absent"], "--data {folder}/absent: there is no such folder"),
        (["--data", "{folder}", "--forget-split", "forget07"], "there is no forget split 'forget07'; {folder} has"),
        (["--retain-results", "absent.json"], "--retain-results absent.json: there is no such file"),
        (["--reference-results", "absent.json"], "--reference-results absent.json: there is no such file"),
        (["--language", "xx"], "there is no word list for language 'xx'; give one of ar, bg, "),
        (["--output", "absent/results.json"], "--output absent/results.json: there is no folder absent"),
        (["--model", "nobody/nothing"], "--model nobody/nothing is no folder that the results could go to"),
    ],
)
def test_bad_eval(options: list[str], told: str, folder: Path) -> None:
    options = [option.format(folder=folder) for option in options]
    assert told.format(folder=folder) in refusal(palu_command("eval", "--model", folder / "model", *options))


def test_a_report_of_nothing(tmp_path: Path) -> None:
    assert refusal(palu_command("report", tmp_path / "absent")) == f"there is no folder {tmp_path / 'absent'}"


# --- doctor ---
def test_doctor() -> None:
    result = done("doctor")
    assert ops.extension_path() in result.stdout
    assert f"torch {torch.__version__}" in result.stdout
    assert "All passed." in result.stdout
    for op in (
        "prefix_mask",
        "topk_mse, global_mean",
        "linear_topk_mse, local_mean",
        "cross_entropy_",
        "kl_div_, reverse",
    ):
        for device in ["cpu", "cuda:0"][: 1 + torch.cuda.is_available()]:
            for dtype in ("float32", "float64"):
                assert re.search(rf"^ok +{op} +{device} +{dtype} ", result.stdout, re.MULTILINE), (op, device, dtype)


def spoil(good: Callable[..., Any]) -> Callable[..., Any]:
    def spoilt(*args: Any) -> Any:
        return good(*args) * 1.001

    return spoilt


def test_doctor_finds_an_op_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "topk_mse", spoil(ops.topk_mse))
    result = palu_command("doctor")
    assert result.exit_code == 1
    failed = [line for line in result.stdout.splitlines() if line.startswith("FAILED")]
    assert len(failed) == 8, failed
    assert all(" topk_mse" in line for line in failed)
    assert "8 failed" in result.stdout


def test_doctor_finds_an_op_that_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any) -> None:
        raise NotImplementedError("no kernel for this device\nand more")

    monkeypatch.setattr(ops, "prefix_mask", missing)
    result = palu_command("doctor")
    assert result.exit_code == 1
    assert result.stdout.count("NotImplementedError: no kernel for this device\n") == 2


def test_doctor_without_the_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a build needs is told, and what of it is here."""
    monkeypatch.delattr(palu, "ops")
    monkeypatch.setitem(sys.modules, "palu.ops", None)
    result = palu_command("doctor")
    assert result.exit_code == 1
    assert re.search(r"C\+\+ compiler \(.*\): \S", result.stdout)
    assert "ninja: " in result.stdout


# --- devices ---
@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """accelerate would choose a device on which nothing can be computed."""
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "meta")
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("name", ["unlearn", "inspect", "eval", "audit"])
def test_the_device_can_be_given(
    name: str,
    folder: Path,
    arguments: list[Any],
    unmarked: Path,
    tofu: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = ["--forget", folder / "forget.jsonl"]
    models = ["--model", folder / "model", "--original", folder / "model"]
    small = ["--forget-split", "forget01", "--data", tofu, "--no-progress", "--max-new-tokens", 1]
    commands: dict[str, list[Any]] = {
        "unlearn": [*arguments, "--epochs", 1],
        "inspect": ["inspect", *models[:2], "--forget", unmarked, "--annotate", "contrast"],
        "eval": ["eval", *models[:2], *small, "--output", tmp_path / "results.json"],
        "audit": ["audit", *models, *rows, "--output", tmp_path / "audit", "--quick", "--draws", 1, "--no-progress"],
    }
    with monkeypatch.context() as patch:
        if name == "audit":  # which would take long
            patch.setattr("palu.attacks.run.attacks_of", lambda *_, **__: [AskGreedily(1)])
        assert palu_command(*commands[name]).exit_code != 0
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        AcceleratorState._reset_state(True)
        result = palu_command(*commands[name], "--device", "cpu")
    assert result.exit_code == 0, result.output
    if name == "unlearn":
        assert read(tmp_path / "out" / "private" / "summary.json")["device"] == "cpu"


@pytest.mark.usefixtures("elsewhere")
def test_doctor_tells_the_device() -> None:
    assert "\nruns use meta, as accelerate chooses; --device names another one\n" in palu_command("doctor").stdout


def test_a_device_that_is_not_there(
    folder: Path, arguments: list[Any], unmarked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = ["--model", folder / "model", "--original", folder / "model"]
    commands = [
        arguments,
        ["inspect", *models[:2], "--forget", unmarked, "--annotate", "whole"],
        ["eval", *models[:2]],
        ["audit", *models, "--forget", unmarked, "--output", folder / "audit"],
    ]
    for command in commands:
        for name in ("gpu", "cuda:99", "cpu:1"):
            said = refusal(palu_command(*command, "--device", name))
            assert said.startswith(f"--device {name}: torch has no such device here; give one of cpu")
    monkeypatch.setenv("WORLD_SIZE", "2")
    told = "--device cpu: the launcher gives each process its device; leave it out"
    assert refusal(palu_command(*arguments, "--device", "cpu")) == told
    said = refusal(palu_command(*commands[1][:-2], "--device", "cpu"))
    assert said == "--device was given without --annotate, which may run a model; leave it out"


# --- rendering ---
@pytest.mark.parametrize("annotate", [[], ["--annotate", "regex:in the city"]])
def test_every_row_is_rendered_and_tokenised_once(
    annotate: list[str], arguments: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the complaints, the record, what is printed and the run together."""
    rendered: list[str] = []
    original = Renderer.render

    def render(self: Renderer, row: int, where: str, columns: Any, *args: Any, **kwargs: Any) -> Any:
        rendered.append(columns.get("answer", "of an anchor's prompt"))
        return original(self, row, where, columns, *args, **kwargs)

    monkeypatch.setattr(Renderer, "render", render)
    done(*arguments, "--anchors", 0, *annotate)
    own = len(anchor_texts()[-GENERAL:])  # the record's general questions, as prompts and with the model's own answers
    answers = [row["answer"] for row in [*FORGET, *RETAIN]]
    assert len(rendered) == len(answers) + 2 * own and sorted(set(rendered) & set(answers)) == sorted(set(answers))
    assert all(rendered.count(answer) == answers.count(answer) for answer in answers)
