"""The two parts of a run's folder: what may be published, and private/, which holds the forget set."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from helpers.command import contents, done, read, write_rows
from helpers.planted import FORGET, RETAIN
from helpers.tiny import same_weights, weights
from transformers import AutoModelForCausalLM, AutoTokenizer

import palu


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
    data = record["data"]["forget"]
    for found in filter(None, (code, data["tokens_sha256"], data["file_sha256"])):
        assert found in report and found not in redacted


def test_private_is_its_owners(arguments: list[Any], out: Path) -> None:
    before = os.umask(0)
    try:
        done(*arguments, "--max-steps", 1)
        private = out / "private"
        assert stat.S_IMODE(private.stat().st_mode) == 0o700
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

    # A run that was killed while it was written can be written again.
    (out / "private" / "summary.json").unlink()
    palu.save_run(out, result, tokenizer, recorder)
