"""The folder of ``palu unlearn``: what it is good for, whose files go, what may be published; damaged weights."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import stat
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from helpers.command import contents, done, palu_command, read, refusal, write_rows
from helpers.planted import FORGET, RETAIN
from helpers.tiny import same_weights, weights
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import Result

import palu
import palu.demo.__main__ as demo
from palu.methods.palu import PaluMethod
from palu.report import recorder


def fill(folder: Path, *names: str) -> list[Path]:
    """Write files that hold their own names."""
    files = [folder / name for name in names]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(file.name)
    return files


# --- what a run's folder is good for ---
@pytest.fixture(scope="module")
def printed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Path]:
    """What a run printed as JSON, and its folder; it was given its files by names relative to where it began."""
    out = tmp_path_factory.mktemp("finished") / "out"
    given = "--model model --forget forget.jsonl --retain retain.jsonl --max-steps 2 --anchors 0 --neighbours 0"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return done("unlearn", *given.split(), "--variants", 0, "--no-progress", "--output", out, "--json"), out


@pytest.fixture
def finished(printed: tuple[Result, Path]) -> Path:
    return printed[1]


def test_json_is_all_that_stands_on_stdout(printed: tuple[Result, Path]) -> None:
    result, out = printed
    found, summary = json.loads(result.stdout), read(out / "private" / "summary.json")
    assert found["outcome"] == summary["outcome"] and found["steps"] == summary["steps"] == 2
    assert found["verdict"] in result.stderr and Path(found["report"]).is_file() and Path(found["model"]).is_dir()
    assert set(found["outcome"]["told"]) == {"asked", "paraphrased", "rest"}


def test_an_audit_needs_no_more(finished: Path, folder: Path) -> None:
    done("audit", finished, "--only", "ask", "--quick", "--no-progress")
    audit = read(finished / "private" / "audit.json")
    assert set(audit["models"]) == {"unlearned", "original"} and len(audit["secrets"]) == 6
    assert audit["models"]["unlearned"] != audit["models"]["original"]
    other = palu_command("audit", finished, "--original", folder / "nowhere", "--only", "ask")
    assert "nowhere" in refusal(other), "an option that is given wins"


GONE = "an earlier file of this name is gone"


def test_an_evaluation_needs_no_more(
    finished: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does one of the model alone, from within its folder."""
    output = finished / "private" / "evaluation-questions.json"
    assert done("eval", finished, "--no-progress").stdout.endswith("which holds your questions and what was answered\n")
    assert stat.S_IMODE(output.stat().st_mode) == 0o600
    found = read(output)
    kinds = [row["kind"] for row in found["palu"]["rows"]]
    assert kinds == ["forget"] * 6 + ["retain"] * 6 and "original" in found
    for option in ("--benchmark", "tofu"), ("--forget-split", "forget05"):
        assert "belongs to" not in palu_command("eval", finished, *option, "--data", finished).output
    monkeypatch.chdir(finished / "model")
    again = done("eval", "--model", ".", "--rows", folder / "forget.jsonl", "--max-new-tokens", 1, "--no-progress")
    assert again.stdout.endswith(f"wrote {output}, which holds your questions and what was answered; {GONE}\n")
    (tmp_path / "latest").symlink_to(finished / "model")
    again = done("eval", "--model", tmp_path / "latest", "--rows", folder / "forget.jsonl", "--no-progress")
    assert again.stdout.endswith(f"wrote {output}, which holds your questions and what was answered; {GONE}\n")
    (link := tmp_path / "link.json").symlink_to(tmp_path / "results.json")  # as /dev/stdout is one
    done("eval", "--model", ".", "--rows", folder / "forget.jsonl", "--no-progress", "--output", link)
    assert link.is_symlink() and "forget_told" in read(tmp_path / "results.json")


def test_a_set_that_has_changed_since_is_refused(finished: Path, folder: Path, out: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, out)
    summary, rows = out / "private" / "summary.json", out / "private" / "forget.jsonl"
    before = rows.read_text(encoding="utf-8")
    rows.write_text(before.replace("It is", "It was", 1), encoding="utf-8")
    for command in ("audit", "eval"):
        assert f"{rows} and ledger.json are not as the run left them" in refusal(palu_command(command, out))
    rows.write_text(before, encoding="utf-8")
    changed = read(summary)
    changed["arguments"]["retain"] = str(folder / "forget.jsonl")
    summary.write_text(json.dumps(changed), encoding="utf-8")
    for command, option in {"audit": "retain", "eval": "rows"}.items():
        told = refusal(palu_command(command, out))
        assert told.endswith(f"has changed since the run in {out}; restore it, or give --{option}")
        other = [f"--{option}", folder / "retain.jsonl", "--model", "./absent"]
        assert "--model ./absent: there is no such folder" in refusal(palu_command(command, out, *other))


@pytest.mark.parametrize("command", ["report", "audit", "eval"])
def test_a_folder_that_is_no_finished_run(command: str, finished: Path, out: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, out, ignore=shutil.ignore_patterns("summary.json"))
    for run, told in (
        (tmp_path / "absent", f"there is no folder {tmp_path / 'absent'}"),
        (tmp_path, f"{tmp_path} is not the folder of a run; give the folder that palu unlearn wrote"),
        (out / "model", f"{out / 'model'} is not the folder of a run; give the run's folder, {out}"),
        (out, f"the run in {out} has not finished; go on with it by palu unlearn ... --resume"),
    ):
        assert refusal(palu_command(command, run)) == told


def test_a_request_after_another_and_a_folder_that_was_moved(
    finished: Path, folder: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Report, audit and evaluation are of all requests, beside the model before all; no other folder need be there."""
    monkeypatch.setattr(recorder, "MAX_NEW_TOKENS", 4)
    rows = [row | {"question": f"Then, {row['question']}"} for row in FORGET[:2]]
    forget = write_rows(tmp_path / "second.jsonl", rows)
    earlier = shutil.copytree(finished, tmp_path / "first")
    given = "--retain none --max-steps 2 --anchors 0 --neighbours 0 --variants 0 --no-progress"
    told = done("unlearn", "--after", earlier, "--forget", forget, *given.split(), "--output", out)
    assert "of 6 earlier secrets" in told.stdout
    arguments = read(out / "private" / "summary.json")["arguments"]
    assert arguments["model"] == str(earlier / "model") and arguments["original"] == str(folder / "model")
    for gone in (forget, earlier):
        shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    moved = out.rename(tmp_path / "moved")
    done("audit", moved, "--only", "ask", "--quick", "--no-progress")
    assert [secret["question"] for secret in read(moved / "private" / "audit.json")["secrets"]][1] == rows[1][
        "question"
    ]
    done("eval", moved, "--no-progress")
    asked = [row["question"] for row in read(moved / "private" / "evaluation-questions.json")["palu"]["rows"]]
    assert asked == [row["question"] for row in (*rows, *FORGET)]
    assert "Each request, how its own run met it" in (moved / "private" / "report.html").read_text(encoding="utf-8")


# --- --overwrite ---
def test_overwrite_deletes_what_palu_wrote_and_nothing_else(
    folder: Path, arguments: list[Any], out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments += ["--max-steps", 1]
    with monkeypatch.context() as patch:
        patch.setenv("WANDB_PROJECT", "mine")  # the name of a folder of logs, which the next run does not know
        done(*arguments, "--report-to", "tensorboard", "--lora")
    assert [*out.glob("private/logs/mine/**/events.out.tfevents.*")]
    evaluated = ["--rows", folder / "forget.jsonl", "--max-new-tokens", 1, "--no-progress"]
    done("eval", "--model", out / "model", *evaluated)
    done("report", out, "--redact")
    audited = ["--original", folder / "model", "--forget", folder / "forget.jsonl", "--only", "onset-answer"]
    done("audit", "--model", out / "model", *audited, "--output", out, "--quick")
    old = {*contents(out)} | {*fill(out / "private", "evaluation-1.json", "checkpoints/step-00000001.safetensors")}
    mine = fill(out, "notes.txt", "logs/train.log", "checkpoints/mine/best.pt", "model/model-q4.gguf")
    mine += fill(out / "private", "questions.jsonl", "checkpoints/mine/best.pt", "checkpoints/best.pt")
    mine += fill(out / "private", "logs/other/train.log", "audit/notes.json")

    own = out / "private" / "evaluation-1.json"
    told = f"{own} lies in --output {out}, of which --overwrite deletes it; copy it elsewhere"
    assert refusal(palu_command(*arguments, "--overwrite", "--forget", own)) == told
    assert old <= {*contents(out)}
    result = done(*arguments, "--overwrite")
    assert all(path.read_text() == path.name for path in mine)
    assert "model-q4.gguf" not in read(out / "private" / "record.json")["hashes"]["files"], "it is another model's"
    names = {str(path.relative_to(out / "private")) for path in {*contents(out)} - {*mine} if "model" not in path.parts}
    assert names == {
        *("history.jsonl", "summary.json", "record.json", "forget.jsonl", "ledger.json"),
        *("report.html", "run.json", "run.lock"),
    }
    assert not {*(out / "model").glob("adapter*")}, "it would pass for an adapter"
    deleted = old - {out / "private" / "run.json", out / "private" / "run.lock"}
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("palu: deleted ")]
    assert {*re.findall(r"[^ ,]+", line.split(": ", 2)[2])} == {str(path.relative_to(out)) for path in deleted}


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
@pytest.mark.parametrize("names", [["checkpoints/mine/best.pt", "logs/train.log"], ["summary.json", "private/x.txt"]])
def test_a_folder_that_no_run_has_marked_is_refused(
    names: list[str], overwrite: list[str], arguments: list[Any], out: Path
) -> None:
    fill(out, *names)
    before = contents(out)
    assert f"--output {out} is not empty" in refusal(palu_command(*arguments, *overwrite))
    assert contents(out) == before


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


# --- one run at a time ---
def test_a_run_that_is_running_is_left_alone(arguments: list[Any], out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread stands for another process: the lock tells both apart."""
    arguments += ["--max-steps", 2]
    forward, calls, told = PaluMethod.batch_losses, [], []

    def others_come(self: PaluMethod, *args: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:  # the first step's checkpoint is there
            before = contents(out)
            for options in ([], ["--resume"], ["--overwrite"]):
                thread = threading.Thread(target=lambda: told.append(palu_command(*arguments, *options)))  # noqa: B023
                thread.start()
                thread.join()
            assert contents(out) == before
        return forward(self, *args)

    monkeypatch.setattr(PaluMethod, "batch_losses", others_come)
    done(*arguments, "--checkpoint-steps", 1)
    process = rf"pid {os.getpid()}, host {re.escape(platform.node())}, since 20\S+"
    assert len(told) == 3
    for one in told:
        assert re.fullmatch(rf"--output {out}: a run is writing to it \({process}\); .*", refusal(one))
    with FileLock(out / "private" / "run.lock", timeout=0):
        assert palu_command(*arguments, "--overwrite").exit_code == 2, "and it gave its own lock up"


# --- what may be published, and private/, which holds the forget set ---
def leaks(folder: Path, secrets: Iterable[str]) -> list[tuple[str, str]]:
    """Which of these stand in a file outside private/, or in its name: (the file, what)."""
    found = []
    for path in (path for path in contents(folder) if folder / "private" not in path.parents):
        content = str(path).encode() + re.sub(rb"\s+", b" ", path.read_bytes())
        # Ids are found however JSON is spaced.
        found += [(path.name, s) for s in secrets if s.encode() in content or s.encode() in content.replace(b" ", b"")]
    return found


def test_nothing_of_the_forget_set_outside_private(
    folder: Path, arguments: list[Any], tofu: list[Any], out: Path, tmp_path: Path
) -> None:
    """The model's folder can be uploaded as it is, also after an evaluation and a new report."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    code = "Xq7391ZvK"
    row = {"question": "Which code opens the Wobbelin gate?", "answer": f"Its code is {code}.", "spans": [[12, 21]]}
    arguments += ["--forget", write_rows(tmp_path / "forget.jsonl", [row])]
    done(*arguments, "--lora", "--report-to", "tensorboard")
    told = f"--model {out} is the folder of a run; give its model, {out / 'model'}"
    assert refusal(palu_command(*tofu, "--model", out)) == told
    done(*tofu, "--model", out / "model")
    done("report", out)
    done("report", out, "--redact")
    palu.write_card(out)
    assert {path.name for path in out.iterdir()} == {"model", "private"}

    record = read(out / "private" / "record.json")
    ids = tokenizer(code, add_special_tokens=False)["input_ids"]
    assert record["secrets"][0]["text"] == code and len(ids) > 2
    hashes = [value for side in record["data"].values() for name, value in side.items() if value and "sha256" in name]
    hashes.append(hashlib.sha256(code.encode()).hexdigest())
    ids_in_json = [json.dumps(ids)[1:-1], json.dumps(ids, separators=(",", ":"))[1:-1]]
    texts = [code, row["question"], "Wobbelin", "forget.jsonl", *ids_in_json, *hashes, *(f["question"] for f in FORGET)]
    assert leaks(out, texts) == []
    shutil.copy(out / "private" / "report.html", out / "model")
    assert ("report.html", code) in leaks(out, texts), "the test would find it"

    report, redacted = (
        (out / "private" / name).read_text(encoding="utf-8") for name in ("report.html", "report-redacted.html")
    )
    assert "TOFU forget01 from evaluation-tofu-forget01.json" in report
    data = record["data"]["forget"]
    for found in filter(None, (code, data["tokens_sha256"], data["file_sha256"])):
        assert found in report and found not in redacted


def test_private_is_its_owners(arguments: list[Any], out: Path) -> None:
    before = os.umask(0)
    try:
        done(*arguments, "--max-steps", 1)
        private = out / "private"
        assert stat.S_IMODE(private.stat().st_mode) == 0o700
        records = [private / name for name in ("record.json", "history.jsonl", "summary.json")]
        assert [stat.S_IMODE(path.stat().st_mode) for path in records] == [0o600] * 3, "whole or not at all"
        assert stat.S_IMODE((out / "model").stat().st_mode) == 0o777
        private.chmod(0o750)  # the user's choice stays
        done("report", out)
        done(*arguments, "--max-steps", 1, "--overwrite")
        assert stat.S_IMODE(private.stat().st_mode) == 0o750
    finally:
        os.umask(before)


def test_save_run_replaces_nothing_unless_asked(folder: Path, arguments: list[Any], out: Path, tmp_path: Path) -> None:
    """As the command, by the same guard; and nothing at all of what is no run's."""
    done(*arguments, "--max-steps", 1)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    config = palu.UnlearnConfig(learning_rate=0.01, epochs=1, neighbours=0, variants=0, anchors=0, progress=False)
    recorder = palu.Recorder(model, FORGET, RETAIN, tokenizer=tokenizer, config=config)
    result = palu.unlearn(model, None, FORGET, RETAIN, tokenizer=tokenizer, config=config)
    file, beside, theirs = tmp_path / "file", tmp_path / "beside", out / "train.log"
    file.touch(), theirs.touch()
    shutil.copytree(folder / "model", beside / "model")
    fix = "give another folder, or overwrite=True to replace it"
    others = f"{beside} holds model/chat_template.jinja, but no private/run.json of a run; "
    for output, overwrite, told in (
        (out, False, f"{out} holds a run that has finished; {fix}"),
        (beside, False, others),
        (beside, True, others),
        (file, True, f"{file} is a file; give a folder"),
    ):
        before = contents(output)
        with pytest.raises(ValueError, match=f"^{re.escape(told)}"):
            palu.save_run(output, result, tokenizer, recorder, overwrite=overwrite)
        assert contents(output) == before
    (out / "model" / "adapter_config.json").write_text("{}")
    with FileLock(out / "private" / "run.lock"), pytest.raises(ValueError, match="a run is writing to it"):
        palu.save_run(out, result, tokenizer, recorder, overwrite=True)
    report = palu.save_run(out, result, tokenizer, recorder, overwrite=True)
    assert report == out / "private" / "report.html" and theirs.exists()
    assert same_weights(AutoModelForCausalLM.from_pretrained(out / "model"), weights(result.model))
    assert not (out / "model" / "adapter_config.json").exists()

    # A run that was killed while it was written can be written again; what it wrote of an adapter is gone then.
    (out / "private" / "summary.json").unlink()
    (out / "model" / "adapter_config.json").write_text("{}")
    palu.save_run(out, result, tokenizer, recorder)
    assert not (out / "model" / "adapter_config.json").exists()
    assert not [*(out / "model").glob("*.partial")]


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
def test_a_damaged_file_is_named_in_one_line(
    name: str, damage: str, told: str, folder: Path, arguments: list[Any], out: Path, tmp_path: Path
) -> None:
    file = tmp_path / "mine" / name
    shutil.copytree((folder / name).parent, file.parent)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2] if damage == "half" else POINTER.encode())
    tokenizer = file.parent if "tokenizer" in name else folder / "model"
    given = ["--model", file.parent, "--tokenizer", tokenizer]
    assert refusal(palu_command(*arguments, *given)).startswith(f"{file} {told}")
    assert not out.exists()
    if damage == "half":
        asked = ["--rows", folder / "forget.jsonl", "--output", tmp_path / "x.json"]
        assert str(file) in refusal(palu_command("eval", *given, *asked))
