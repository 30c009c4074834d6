"""``palu push``: what the hub gets of a run, and what keeps it from being sent."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from helpers.command import contents, done, palu_command, read, refusal, short_run
from helpers.hub import OWNER, READER, Hub, running_hub
from helpers.planted import SECRETS
from huggingface_hub import ModelCard, constants

from palu.attacks.run import FORMAT as AUDIT_FORMAT

KINDS = ("whole", "lora")


@pytest.fixture(scope="module")
def finished(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two runs that have finished: a whole model, and an adapter."""
    made = {}
    for kind in KINDS:
        made[kind] = tmp_path_factory.mktemp(kind) / "run"
        done(*short_run(folder, made[kind]), "--max-steps", 1, *(["--lora"] if kind == "lora" else []))
    return made


@pytest.fixture
def run(finished: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the run, to be changed."""
    return Path(shutil.copytree(finished["whole"], tmp_path / "run"))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that knows us as "me"."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("HF_TOKEN", OWNER)
    with running_hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        yield hub


def files_of(run: Path) -> dict[str, bytes]:
    model = run / "model"
    return {path.relative_to(model).as_posix(): content for path, content in contents(model).items()}


def edit(path: Path, change: Callable[[str], str]) -> None:
    path.write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8")


# --- what is sent ---
@pytest.mark.parametrize("kind", KINDS)
def test_the_model_is_sent_when_asked_and_nothing_else(kind: str, finished: dict[str, Path], hub: Hub) -> None:
    run = finished[kind]
    before, files = contents(run), files_of(run)
    said = done("push", run, "me/forgot").stdout
    assert hub.requests == [], "a dry run does not even ask the hub"
    listed = {line.split()[0]: line.split()[1:] for line in said.splitlines()[1:] if len(line.split()) == 3}
    assert listed.keys() == files.keys()
    weights = "model.safetensors" if kind == "whole" else "adapter_model.safetensors"
    assert listed[weights][1] == listed["tokenizer.json"][1] == "no" and listed["README.md"][1] == "yes"
    assert said.endswith("for me/forgot (private); nothing was sent: add --send to send it\n")
    assert ("names the base model as" in said) is (kind == "lora")

    sent = done("push", run, "me/forgot", "--send").stdout
    assert f"sent {len(files)} files" in sent and sent.endswith(f"to {hub.url}/me/forgot (private)\n")
    assert hub.repos.keys() == {"me/forgot"} and hub.repos["me/forgot"]["private"]
    assert hub.repos["me/forgot"]["files"] == files
    done("push", run, "another", "--send", "--public")
    assert not hub.repos["me/another"]["private"], "the owner is who is logged in"
    assert contents(run) == before


def test_a_second_push_replaces_the_first(finished: dict[str, Path], hub: Hub) -> None:
    """Weights in other parts are gone, since they would be loaded in place of these; others' files stay."""
    old = {"model-00001-of-00002.safetensors": b"1", "model.safetensors.index.json": b"{}", "config.json": b"{}"}
    hub.repos["me/forgot"] = {"private": True, "files": {**old, "notes.md": b"mine"}, "commits": []}
    done("push", finished["lora"], "me/forgot", "--send")
    assert hub.repos["me/forgot"]["files"] == {**files_of(finished["lora"]), "notes.md": b"mine"}
    assert len(hub.repos["me/forgot"]["commits"]) == 1, "at no time are there files of two models"


def test_a_card_that_is_missing_is_written(run: Path, hub: Hub) -> None:
    card = (run / "model" / "README.md").read_bytes()
    (run / "model" / "README.md").unlink()
    done("push", run, "me/forgot", "--send")
    assert hub.repos["me/forgot"]["files"]["README.md"] == card
    about = ModelCard(card.decode()).data
    assert (about.library_name, about.pipeline_tag, about.base_model) == ("transformers", "text-generation", None)


# --- secrets ---
@pytest.mark.parametrize("file", ["README.md", "config.json", "chat_template.jinja"])
def test_a_secret_in_a_text_is_refused(file: str, run: Path, hub: Hub) -> None:
    path = run / "model" / file
    row, secret = 1, SECRETS[1].upper()
    if file.endswith(".json"):
        path.write_text(json.dumps(read(path) | {"told": f"by {secret}."}, indent=2), encoding="utf-8")
    else:
        edit(path, lambda text: f"{text}\nIt was {secret}.\n")
    line = next(i for i, one in enumerate(path.read_text(encoding="utf-8").splitlines(), 1) if secret in one)
    arguments = ["push", run, "me/forgot", "--send", "--changed"]
    said = refusal(palu_command(*arguments))
    assert said.startswith(
        f"a secret stands in what would be sent ({file}, line {line}: of forget row {row} (line 2)); "
    )
    assert secret.casefold() not in said.casefold() and hub.requests == []
    shown = done(*arguments, "--checked", file).stdout
    assert [line.split()[-1] for line in shown.splitlines() if line.startswith(file)] == ["you"]
    assert hub.repos["me/forgot"]["files"][file] == path.read_bytes()


def test_where_else_secrets_are_looked_for_and_where_not(run: Path, hub: Hub) -> None:
    """In the name and those of files, and those of an audit; not in a vocabulary, nor within longer words."""
    assert "me/ada-lovelace, line 1: of forget row 1" in refusal(palu_command("push", run, "me/ada-lovelace"))
    done("push", run, "me/adalovelaces", "--send")
    edit(run / "model" / "tokenizer.json", lambda text: json.dumps(json.loads(text) | {"x": SECRETS[1]}))
    (run / "model" / "data.bin").write_bytes(b"\0" + SECRETS[1].encode())
    done("push", run, "me/x", "--changed", "--checked", "README.md", "--checked", "config.json")

    added = run / "model" / "ada-lovelace.bin"
    added.write_bytes(b"\0")
    given = ["push", run, "me/x", "--changed", "--checked", "README.md", "--checked", "config.json"]
    assert "(the name of ada-lovelace.bin, line 1: of forget row 1 (line 2))" in refusal(palu_command(*given))
    done(*given, "--checked", "ada-lovelace.bin")
    added.unlink()

    audit = {"format": AUDIT_FORMAT, "marked": ["Text Generation"], "secrets": []}
    (run / "private" / "audit.json").write_text(json.dumps(audit), encoding="utf-8")
    said = refusal(palu_command("push", run, "me/x", "--changed"))
    assert "(README.md, line 3: of audit.json)" in said, "in the metadata"


def test_many_places_are_counted(run: Path) -> None:
    edit(run / "model" / "README.md", lambda text: text + f"\n{SECRETS[0]}" * 12)
    said = refusal(palu_command("push", run, "me/x"))
    assert said.count("of forget row 0 (line 1)") == 10 and "; and 2 more); take it out" in said


# --- what is not a finished run's model ---
def unfinished(run: Path) -> Path:
    (run / "private" / "summary.json").unlink()
    return run


def unmarked(run: Path) -> Path:
    (run / "private" / "run.json").unlink()
    return run


def damaged(run: Path) -> Path:
    (run / "private" / "record.json").write_text("{")
    return run


def with_others(run: Path) -> Path:
    (run / "model" / "notes").mkdir()
    (run / "model" / "notes" / "me.txt").touch()
    (run / "model" / "generation_config.json").unlink()
    edit(run / "model" / "config.json", lambda text: text + " ")
    return run


def without_model(run: Path) -> Path:
    shutil.rmtree(run / "model")
    return run


def linked(run: Path) -> Path:
    (run / "model" / "notes.txt").symlink_to(run / "private" / "record.json")
    return run


def linked_folder(run: Path) -> Path:
    (run / "model" / "all").symlink_to(run / "private")
    return run


def linked_model(run: Path) -> Path:
    (run / "model").rename(run.parent / "elsewhere")
    (run / "model").symlink_to(run.parent / "elsewhere")
    return run


OTHERS = "config.json (changed), generation_config.json (gone), notes/me.txt (new)"
REFUSED: list[tuple[Callable[[Path], Path], str]] = [
    (lambda run: run / "absent", "there is no folder {run}/absent"),
    (lambda run: run / "model", "{run}/model is not the folder of a run; give the run's folder, {run}"),
    (unmarked, "{run} is not the folder of a run; give the folder that palu unlearn wrote"),
    (unfinished, "the run in {run} has not finished; go on with it by palu unlearn ... --resume"),
    (damaged, "{run}/private/record.json is damaged ("),
    (without_model, "there is no folder {run}/model; restore it, or run again"),
    (with_others, f"{{run}}/model is not as the run left it: {OTHERS}; undo that, or give --changed to send it so"),
    (linked, "{run}/model/notes.txt is a link to {run}/private/record.json; put what it leads to in its place, or"),
    (linked_folder, "{run}/model/all is a link to {run}/private; "),
    (linked_model, "{run}/model is a link to {run}/../elsewhere; "),
]


@pytest.mark.parametrize(("change", "told"), REFUSED, ids=[told[:40] for _, told in REFUSED])
def test_folders(change: Callable[[Path], Path], told: str, run: Path, hub: Hub) -> None:
    given = change(run)
    before = contents(run)
    for changed in ([], ["--changed"]):
        if changed and change is with_others:
            done("push", given, "me/x", *changed)
            continue
        said = refusal(palu_command("push", given, "me/x", "--send", *changed))
        assert said.startswith(told.format(run=run).replace("run/../", ""))
    assert contents(run) == before and hub.requests == []


def test_a_run_that_is_being_written(run: Path, hub: Hub) -> None:
    with FileLock(run / "private" / "run.lock"):
        assert refusal(palu_command("push", run, "me/x")).startswith(f"{run}: a run is writing to it (pid ")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["a/b/c"], "a/b/c cannot be a name on the hub; give OWNER/NAME, such as me/my-llama"),
        (["me/x", "--checked", "a.txt"], "--checked a.txt: it is not sent; files are named as in {run}/model"),
    ],
)
def test_arguments(given: list[str], told: str, finished: dict[str, Path], hub: Hub) -> None:
    run = finished["whole"]
    assert refusal(palu_command("push", run, *given, "--send")) == told.format(run=run)
    assert hub.requests == []


# --- what the hub refuses ---
def sent(run: Path, *options: str) -> str:
    """What is said of a push that fails on its way."""
    result = palu_command("push", run, "me/forgot", "--send", *options)
    assert result.exit_code == 2 and result.stderr.startswith("palu: "), result.output
    assert result.stderr.count("\n") == 1 and "sent" not in result.stdout.rpartition("searched")[2]
    return result.stderr.removeprefix("palu: ").rstrip()


def test_nobody_and_a_reader_may_not_write(
    finished: dict[str, Path], hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", READER)
    assert sent(finished["whole"]).startswith("the hub refuses me/forgot: you may not write there; ")
    monkeypatch.delenv("HF_TOKEN")
    assert sent(finished["whole"]).startswith(
        "the hub refuses me/forgot: it does not know you; log in by hf auth login"
    )
    assert hub.repos == {}


def test_a_hub_that_cannot_be_reached(finished: dict[str, Path], hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert sent(finished["whole"]).startswith("the hub cannot be reached (")


@pytest.mark.parametrize(("private", "options", "told"), [(False, [], "public"), (True, ["--public"], "private")])
def test_nothing_is_shown_to_others_than_was_asked(
    private: bool, options: list[str], told: str, finished: dict[str, Path], hub: Hub
) -> None:
    """A repository that is there keeps who sees it, whatever is asked for."""
    hub.repos["me/forgot"] = {"private": private, "files": {}, "commits": []}
    said = sent(finished["whole"], *options)
    assert said == f"me/forgot is there already, and {told}; give --{told}, or another name"
    assert hub.repos["me/forgot"]["files"] == {}


def test_metadata_that_the_hub_does_not_take(run: Path, hub: Hub) -> None:
    edit(run / "model" / "README.md", lambda text: "---\n- list\n---\n" + text)
    assert sent(run) == 'Invalid metadata in README.md. - "metadata" must be a mapping'
    assert hub.repos["me/forgot"]["files"] == {}


def test_help_says_what_is_sent() -> None:
    said: Any = " ".join(done("push", "--help").output.split())
    assert "nothing of RUN/private" in said and "[default: private]" in said
