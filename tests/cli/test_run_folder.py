"""The folder of ``palu unlearn``: whose files ``--overwrite`` deletes, one run at a time in it, damaged weights."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from helpers.command import done, palu_command, refusal, write_input
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from typer.testing import Result

import palu.demo.__main__ as demo
from palu.methods.palu import PaluMethod


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/, adapter/, forget.jsonl and retain.jsonl; tests write elsewhere."""
    folder = write_input(tmp_path_factory.mktemp("given"))
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")).save_pretrained(
        folder / "adapter"
    )
    return folder


def unlearn(folder: Path, output: Path, *more: Any) -> Result:
    data = ["--forget", folder / "forget.jsonl", "--retain", folder / "retain.jsonl", "--output", output]
    settings = ["--max-steps", 2, "--anchors", 0, "--neighbours", 0, "--variants", 0, "--no-progress"]
    return palu_command("unlearn", "--model", folder / "model", *data, *settings, *more)


def fill(folder: Path, *names: str) -> list[Path]:
    """Write files that hold their own names."""
    files = [folder / name for name in names]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(file.name)
    return files


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- what a run's folder is good for ---
def test_json_is_all_that_stands_on_stdout(folder: Path, tmp_path: Path) -> None:
    result = unlearn(folder, tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    summary = json.loads((tmp_path / "out" / "private" / "summary.json").read_text(encoding="utf-8"))
    assert found["outcome"] == summary["outcome"] and found["steps"] == summary["steps"] == 2
    assert found["verdict"] in result.stderr and Path(found["report"]).is_file() and Path(found["model"]).is_dir()
    assert set(found["outcome"]["told"]) == {"asked", "paraphrased", "rest"}


@pytest.fixture(scope="module")
def finished(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was given its files by names relative to where it began."""
    out = tmp_path_factory.mktemp("finished") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        result = unlearn(Path(), out)
    assert result.exit_code == 0, result.output
    return out


def test_an_audit_needs_no_more(finished: Path, folder: Path) -> None:
    result = palu_command("audit", finished, "--only", "ask", "--quick", "--no-progress")
    assert result.exit_code == 0, result.output
    audit = json.loads((finished / "private" / "audit.json").read_text(encoding="utf-8"))
    assert set(audit["models"]) == {"unlearned", "original"} and len(audit["secrets"]) == 6
    assert audit["models"]["unlearned"] != audit["models"]["original"]
    other = palu_command("audit", finished, "--original", folder / "nowhere", "--only", "ask")
    assert "nowhere" in refusal(other), "an option that is given wins"


def test_an_evaluation_needs_no_more(finished: Path) -> None:
    result = palu_command("eval", finished, "--no-progress")
    assert result.exit_code == 0, result.output
    found = json.loads((finished / "private" / "evaluation-questions.json").read_text(encoding="utf-8"))
    kinds = [row["kind"] for row in found["palu"]["rows"]]
    assert kinds == ["forget"] * 6 + ["retain"] * 6 and "original" in found
    assert "belongs to" not in palu_command("eval", finished, "--benchmark", "tofu", "--data", finished).output


def test_a_set_that_has_changed_since_is_refused(finished: Path, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    path = out / "private" / "summary.json"
    summary = json.loads(path.read_text(encoding="utf-8"))
    summary["arguments"]["forget"] = str(folder / "retain.jsonl")
    path.write_text(json.dumps(summary), encoding="utf-8")
    for command in ("audit", "eval"):
        told = refusal(palu_command(command, out))
        assert told.endswith(f"has changed since the run in {out}; restore it, or give --forget")
    assert "is no folder of a recorded run" in refusal(palu_command("audit", tmp_path))


# --- --overwrite ---
def test_overwrite_deletes_what_palu_wrote_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = unlearn(folder, out, "--report-to", "tensorboard", "--lora")
    assert result.exit_code == 0, result.output
    evaluated = ["--rows", folder / "forget.jsonl", "--max-new-tokens", 1, "--no-progress"]
    done("eval", "--model", out / "model", *evaluated)
    done("report", out, "--redact")
    audited = ["--original", folder / "model", "--forget", folder / "forget.jsonl", "--only", "onset-answer"]
    done("audit", "--model", out / "model", *audited, "--output", out, "--quick")
    old = {*contents(out)} | {*fill(out / "private", "forget.annotated.jsonl", "checkpoints/step-00000001.safetensors")}
    mine = fill(out, "notes.txt", "logs/train.log", "checkpoints/mine/best.pt", "model/model-q4.gguf")
    mine += fill(out / "private", "questions.jsonl", "checkpoints/mine/best.pt", "checkpoints/best.pt")
    mine += fill(out / "private", "logs/other/train.log", "audit/notes.json")

    told = refusal(unlearn(folder, out, "--overwrite", "--forget", out / "private" / "forget.annotated.jsonl"))
    assert f"forget.annotated.jsonl lies in --output {out}" in told
    assert old <= {*contents(out)}
    result = unlearn(folder, out, "--overwrite", "--max-steps", 1)
    assert result.exit_code == 0, result.output
    assert all(path.read_text() == path.name for path in mine)
    names = {str(path.relative_to(out / "private")) for path in {*contents(out)} - {*mine} if "model" not in path.parts}
    assert names == {*("history.jsonl", "summary.json", "record.json", "report.html", "run.json", "run.lock")}
    assert not {*(out / "model").glob("adapter*")}, "it would pass for an adapter"
    deleted = old - {out / "private" / "run.json", out / "private" / "run.lock"}
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("palu: deleted ")]
    assert {*re.findall(r"[^ ,]+", line.split(": ", 2)[2])} == {str(path.relative_to(out)) for path in deleted}


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
@pytest.mark.parametrize("names", [["checkpoints/mine/best.pt", "logs/train.log"], ["summary.json", "private/x.txt"]])
def test_a_folder_that_no_run_has_marked_is_refused(
    names: list[str], overwrite: list[str], folder: Path, tmp_path: Path
) -> None:
    fill(tmp_path, *names)
    before = contents(tmp_path)
    assert f"--output {tmp_path} is not empty" in refusal(unlearn(folder, tmp_path, *overwrite))
    assert contents(tmp_path) == before


def test_the_demo_refuses_such_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(tmp_path, "private/summary.json", "private/best.pt")
    monkeypatch.setattr("sys.argv", ["demo", "--output", str(tmp_path), "--overwrite"])
    monkeypatch.setattr(demo, "load_taught", lambda *_: pytest.fail("it begins"))
    before = contents(tmp_path)
    with pytest.raises(SystemExit):
        demo.main()
    assert f"{tmp_path} holds private/summary.json, but no private/run.json of a run" in capsys.readouterr().err
    assert contents(tmp_path) == before


def interrupt_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = PaluMethod.batch_losses

    def pressed(self: PaluMethod, *args: Any) -> Any:
        monkeypatch.undo()
        signal.raise_signal(signal.SIGINT)
        return forward(self, *args)

    monkeypatch.setattr(PaluMethod, "batch_losses", pressed)


@pytest.mark.usefixtures("in_the_foreground")
def test_a_run_that_overwrites_can_be_resumed(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    assert unlearn(folder, out, "--max-steps", 1).exit_code == 0
    interrupt_the_first_step(monkeypatch)
    stopped = unlearn(folder, out, "--overwrite")
    assert stopped.exit_code == 130 and "with --resume in place of --overwrite" in stopped.stderr
    assert "holds a run that was interrupted" in refusal(unlearn(folder, out))
    resumed = unlearn(folder, out, "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert json.loads((out / "private" / "summary.json").read_text())["steps"] == 2


# --- one run at a time ---
def test_a_run_that_is_running_is_left_alone(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread stands for another process: the lock tells both apart."""
    out, forward, calls, told = tmp_path / "out", PaluMethod.batch_losses, [], []

    def others_come(self: PaluMethod, *args: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:  # the first step's checkpoint is there
            before = contents(out)
            for options in ([], ["--resume"], ["--overwrite"]):
                thread = threading.Thread(target=lambda: told.append(unlearn(folder, out, *options)))  # noqa: B023
                thread.start()
                thread.join()
            assert contents(out) == before
        return forward(self, *args)

    monkeypatch.setattr(PaluMethod, "batch_losses", others_come)
    result = unlearn(folder, out, "--checkpoint-steps", 1)
    assert result.exit_code == 0, result.output
    process = rf"pid {os.getpid()}, host {re.escape(platform.node())}, since 20\S+"
    assert len(told) == 3
    for one in told:
        assert re.fullmatch(rf"--output {out}: a run is writing to it \({process}\); .*", refusal(one))
    with FileLock(out / "private" / "run.lock", timeout=0):
        assert unlearn(folder, out, "--overwrite").exit_code == 2, "and it gave its own lock up"


# --- damaged weights ---
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 269060552\n"


@pytest.mark.parametrize(
    ("name", "damage", "told"),
    [
        ("model/model.safetensors", "half", "is damaged"),
        ("model/model.safetensors", "pointer", "is a git-LFS pointer"),
        ("model/tokenizer.json", "pointer", "is a git-LFS pointer"),
        ("adapter/adapter_model.safetensors", "half", "is damaged"),
    ],
)
def test_a_damaged_file_is_named_in_one_line(name: str, damage: str, told: str, folder: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(folder, mine)
    file = mine / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2] if damage == "half" else POINTER.encode())
    more = ["--model", file.parent, "--tokenizer", (mine if "tokenizer" in name else folder) / "model"]
    assert refusal(unlearn(mine, tmp_path / "out", *more)).startswith(f"{file} {told}")
    assert not (tmp_path / "out").exists()
    if name.endswith("model.safetensors") and damage == "half":
        asked = ["--rows", folder / "forget.jsonl", "--output", tmp_path / "x.json", "--tokenizer", folder / "model"]
        assert str(file) in refusal(palu_command("eval", "--model", file.parent, *asked))
