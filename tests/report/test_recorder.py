"""palu.Recorder: what it measures before and after a run, and what it says of model, data and files."""

import copy
import hashlib
import json
import math
import re
from pathlib import Path

import pytest
import torch
from helpers import planted
from helpers.report_runs import FORGET, RETAIN, Run, read
from helpers.tiny import forget_rows, padded, retain_rows, same_weights, tiny_llama, weights
from transformers import LlamaForCausalLM

import palu
from palu import Recorder, UnlearnConfig
from palu.data.tokenize import IGNORE, Example
from palu.hashing import json_digest
from palu.report import recorder, view
from palu.report.manifest import describe_model, hash_files
from palu.report.recorder import token_spans

QUIET = UnlearnConfig(progress=False)


def test_probabilities_are_those_of_an_unpacked_pass(tmp_path: Path) -> None:
    """A secret's is the product over its tokens, a retained answer's the geometric mean."""
    model, rows, kept = tiny_llama(), forget_rows(), retain_rows()
    found = Recorder(model, rows, kept, config=QUIET).save(tmp_path, model)
    assert found is not None and json.loads(json.dumps(found)) == read(tmp_path)
    with torch.no_grad():
        log_p = model(**padded(rows)[0], use_cache=False).logits.double().log_softmax(-1)
        inputs, answers = padded(kept)
        logits = model(**inputs, use_cache=False).logits[:, :-1].double()
    secrets = iter(found["secrets"])
    for i, row in enumerate(rows):
        ids, labels = row["input_ids"], row["labels"]
        for match in re.finditer("s+", "".join("s" if label >= 0 else "." for label in labels)):
            secret, (start, end) = next(secrets), match.span()
            expected = math.exp(sum(log_p[i, t - 1, ids[t]].item() for t in range(start, end)))
            likeliest = [log_p[i, t - 1].argmax().item() == ids[t] for t in range(start, end)]
            assert (secret["row"], secret["tokens"]) == (i, end - start)
            assert secret["before"]["probability"] == pytest.approx(expected, rel=1e-4)
            assert secret["before"]["recalled"] == all(likeliest)
            assert secret["after"] == secret["before"]  # nothing was done to the model
    assert next(secrets, None) is None
    for i, one in enumerate(found["retained"]):
        loss = torch.nn.functional.cross_entropy(logits[i], answers[i, 1:])
        assert one["before"]["probability"] == pytest.approx(math.exp(-loss), rel=1e-4)


@pytest.mark.parametrize(
    ("labels", "spans"),
    [
        ([IGNORE, 5, 6, -200, 7], [(1, 3), (4, 5)]),
        ([IGNORE, -200, 5, -200], [(2, 3)]),
        ([IGNORE, 5, 9, 6], [(1, 2), (3, 4)]),  # 9 ends the sequence
        ([IGNORE, -200, 9], []),
    ],
)
def test_spans_are_runs_of_sensitive_tokens(labels: list[int], spans: list[tuple[int, int]]) -> None:
    example = Example(0, torch.arange(len(labels)), torch.tensor(labels))
    assert token_spans(example, 9) == spans


def test_the_run_is_recorded(run: Run) -> None:
    found = read(run.folder)
    assert [secret["text"] for secret in found["secrets"]] == [row["answer"][slice(*row["spans"][0])] for row in FORGET]
    assert all(secret["before"]["recalled"] for secret in found["secrets"])
    assert not any(secret["after"]["recalled"] for secret in found["secrets"])
    assert len(found["answers"]["forget"]) == recorder.SAMPLES
    assert all(answer["before"] == FORGET[answer["row"]]["answer"] for answer in found["answers"]["forget"])
    assert [answer["question"] for answer in found["answers"]["retain"]] == [row["question"] for row in RETAIN]
    for one, row in zip(found["examples"], FORGET, strict=True):
        assert "".join(piece for piece, _ in one["tokens"]).startswith(row["answer"])


def test_what_the_model_tells_is_recorded(tmp_path: Path) -> None:
    """When asked, in other words, and after a secret's first token: of a model that knows all, and of one that never
    saw them."""
    forget = copy.deepcopy(planted.FORGET)
    forget[1] |= {"question": "Who wrote it? Ada Lovelace?"}  # it tells the secret, which is none then
    forget[2] |= {"paraphrased_question": ["What?", "Tell me 2."]}
    forget[4] |= {"paraphrased_question": "Is it the author?"}
    del forget[3]["paraphrased_question"]
    made = Recorder(planted.original(), forget, planted.RETAIN, tokenizer=planted.tokenizer(), config=QUIET)
    record = made.save(tmp_path, planted.never_saw())
    assert record is not None
    before = {how: [s["before"][how] for s in record["secrets"]] for how in ("asked", "paraphrased", "rest")}
    assert before["asked"] == before["rest"] == [True] * 5
    assert before["paraphrased"] == [True, True, None, None, True]
    found = view.outcome(record)
    assert found["told"]["asked"] == {"before": 5, "after": 0, "of": 5}
    assert found["told"]["paraphrased"] == {"before": 3, "after": 0, "of": 3}
    assert found["told"]["rest"]["after"] == 0 and found["told"]["rest"]["of"] == 5
    first, last = view.last_lines(found).split("\n")
    assert first.startswith("told when asked: 5 → 0 of 5; in other words: 3 → 0 of 3; rest told once its first ")
    assert "secrets are forgotten" in last


def test_a_secret_may_come_late_in_an_answer() -> None:
    """There is room for 64 tokens, or for twice the longest true answer's, but for no more than 200."""
    for words, least, most in ((3, 64, 64), (40, 80, 199), (400, 200, 200)):
        forget = [dict(planted.FORGET[0], answer=" so" * words + f" {planted.SECRETS[0]}"), *planted.FORGET[1:]]
        made = Recorder(planted.original(), forget, None, tokenizer=planted.tokenizer(), config=QUIET)
        assert least <= made.max_new_tokens <= most


def test_model_and_data_are_named_and_hashed(run: Run, tmp_path: Path) -> None:
    """A local model by its folder and licence, not by its path."""
    found = read(run.folder)
    hashes = found["hashes"]
    assert hashes["weights_before"] != hashes["weights_after"]
    assert hashes["config"] == json_digest(run.config.values())
    saved = run.folder / "model" / "model.safetensors"
    assert hashes["files"][saved.name] == hashlib.sha256(saved.read_bytes()).hexdigest()
    assert not hashes["files"].keys() & {"record.json", "history.jsonl", "summary.json"}

    source, path = tmp_path / "home" / "base", tmp_path / "forget.jsonl"
    tiny_llama(vocab_size=len(run.tokenizer)).save_pretrained(str(source))
    (source / "README.md").write_text("---\nlicense: mit\n---\nA base.\n", encoding="utf-8")
    path.write_text("".join(json.dumps(row) + "\n" for row in FORGET), encoding="utf-8")
    model = LlamaForCausalLM.from_pretrained(source)
    record = Recorder(model, path, RETAIN, tokenizer=run.tokenizer, config=QUIET).save(tmp_path / "out", model)
    assert record is not None and str(tmp_path) not in json.dumps(record)
    about, data = record["model"], record["data"]["forget"]
    assert (about["name"], about["on_the_hub"], about["license"]) == ("base", False, "mit")
    assert (data["file"], data["file_sha256"]) == (path.name, hashlib.sha256(path.read_bytes()).hexdigest())
    assert data["tokens_sha256"] == found["data"]["forget"]["tokens_sha256"]
    assert data["tokens_sha256"] != found["data"]["retain"]["tokens_sha256"]


@pytest.mark.parametrize(
    ("name", "on_the_hub"),
    [
        ("meta-llama/Llama-3.2-1B", True),
        ("./llama", False),
        ("../llama", False),
        ("a/b/c", False),
        ("my model/x", False),
        ("gpt2", False),
        ("", False),
    ],
)
def test_a_name_is_of_the_hub_only_if_it_may_be_one(name: str, on_the_hub: bool) -> None:
    model = tiny_llama()
    model.name_or_path = name
    assert describe_model(model)["on_the_hub"] is on_the_hub


def test_files_are_hashed_by_their_names_in_the_folder(tmp_path: Path) -> None:
    (tmp_path / "additional_chat_templates").mkdir()
    for name in ("additional_chat_templates/tool.jinja", "config.json", "README.md"):
        (tmp_path / name).touch()
    assert [*hash_files(tmp_path)] == ["additional_chat_templates/tool.jinja", "config.json"]
    assert [*hash_files(tmp_path, {"config.json"})] == ["additional_chat_templates/tool.jinja"]


def test_looking_changes_neither_the_model_nor_the_random_numbers(run: Run) -> None:
    model = tiny_llama(vocab_size=len(run.tokenizer)).train()
    next(model.parameters()).requires_grad_(False)
    before, flags, state = weights(model), [p.requires_grad for p in model.parameters()], torch.get_rng_state()
    Recorder(model, FORGET, RETAIN, tokenizer=run.tokenizer, config=QUIET)
    assert same_weights(model, before)
    assert model.training and [p.requires_grad for p in model.parameters()] == flags
    assert torch.equal(torch.get_rng_state(), state)


def test_only_some_rows_of_a_large_set_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "RETAIN_ROWS", 4)
    monkeypatch.setattr(recorder, "SHOWN_ROWS", 3)
    model = tiny_llama()
    found = Recorder(model, forget_rows(5), retain_rows(12), config=QUIET).save(tmp_path, model)
    assert found is not None
    assert [one["row"] for one in found["retained"]] == [0, 3, 6, 9]
    assert [one["row"] for one in found["examples"]] == [0, 1, 2]
    assert {one["row"] for one in found["secrets"]} == {0, 1, 2, 3, 4}


def test_an_adapter_is_recorded(run: Run, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = tiny_llama(vocab_size=len(run.tokenizer))
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    config = UnlearnConfig(epochs=2, learning_rate=1e-2, progress=False)
    made = Recorder(adapted, FORGET, RETAIN, tokenizer=run.tokenizer, config=config)
    result = palu.unlearn(adapted, None, FORGET, RETAIN, tokenizer=run.tokenizer, config=config)
    found = made.save(tmp_path, result.model)
    assert found is not None and "peft" in found["versions"]
    assert found["model"]["adapter"] and found["model"]["trainable"] < found["model"]["parameters"]
    assert [s["before"] for s in found["secrets"]] != [s["after"] for s in found["secrets"]]


def test_what_cannot_be_recorded_is_refused(run: Run) -> None:
    model = tiny_llama(vocab_size=len(run.tokenizer))
    with pytest.raises(TypeError, match="forget is an iterator"):
        Recorder(model, iter(FORGET), RETAIN, tokenizer=run.tokenizer)
    with pytest.raises(ValueError, match="the tokenizer has"):
        Recorder(tiny_llama(), FORGET, RETAIN, tokenizer=run.tokenizer)
