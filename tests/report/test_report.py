"""Record, report and model card, without a browser: what is measured, and that no text can break the page."""

import copy
import hashlib
import json
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import planted
from helpers.audits import ATTACKS, write_audit
from helpers.report_runs import FORGET, HOSTILE, RETAIN, Run, copy_of, perform
from helpers.tiny import forget_rows, padded, retain_rows, same_weights, tiny_llama, weights
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

import palu
from palu import Recorder, UnlearnConfig, write_card, write_report
from palu.data.tokenize import IGNORE, Example
from palu.hashing import json_digest
from palu.methods.palu import RECIPES
from palu.report import audited, plots, recorder, view, words
from palu.report.plots import downsample, line_chart, number
from palu.report.reading import RecordError
from palu.report.recorder import token_spans

QUIET = UnlearnConfig(progress=False)


@pytest.fixture
def folder(run: Run, tmp_path: Path) -> Path:
    return copy_of(run, tmp_path / "run")


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "private" / "record.json").read_text(encoding="utf-8"))


def change(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    changed = read(folder)
    edit(changed)
    (folder / "private" / "record.json").write_text(json.dumps(changed), encoding="utf-8")


class Page(HTMLParser):
    """The texts and the tags of a page."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


# --- what is measured ---
def test_probabilities_are_those_of_an_unpacked_pass(tmp_path: Path) -> None:
    model, rows, kept = tiny_llama(), forget_rows(), retain_rows()
    Recorder(model, rows, kept, config=QUIET).save(tmp_path, model)
    inputs, _ = padded(rows)
    with torch.no_grad():
        log_p = model(**inputs, use_cache=False).logits.double().log_softmax(-1)
    secrets = iter(read(tmp_path)["secrets"])
    for number_, row in enumerate(rows):
        ids, labels = row["input_ids"], row["labels"]
        runs = re.finditer("s+", "".join("s" if label >= 0 else "." for label in labels))
        for start, end in (match.span() for match in runs):
            secret = next(secrets)
            expected = math.exp(sum(log_p[number_, t - 1, ids[t]].item() for t in range(start, end)))
            likeliest = [log_p[number_, t - 1].argmax().item() == ids[t] for t in range(start, end)]
            assert (secret["row"], secret["tokens"]) == (number_, end - start)
            assert secret["before"]["probability"] == pytest.approx(expected, rel=1e-4)
            assert secret["before"]["recalled"] == all(likeliest)
            assert secret["after"] == secret["before"]  # nothing was done to the model
    assert next(secrets, None) is None


def test_retained_probability_is_the_geometric_mean(tmp_path: Path) -> None:
    model, kept = tiny_llama(), retain_rows()
    Recorder(model, forget_rows(), kept, config=QUIET).save(tmp_path, model)
    inputs, answers = padded(kept)
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits[:, :-1].double()
    for i, found in enumerate(read(tmp_path)["retained"]):
        loss = torch.nn.functional.cross_entropy(logits[i], answers[i, 1:])
        assert found["before"]["probability"] == pytest.approx(math.exp(-loss), rel=1e-4)


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
    forget[1] |= {"question": "Who wrote it? Ada Lovelace?"}  # it tells the secret, so nobody can ask for it
    forget[2] |= {"paraphrased_question": ["What?", "Tell me 2."]}
    forget[4] |= {"paraphrased_question": "Is it the author?"}
    del forget[3]["paraphrased_question"]
    made = Recorder(planted.original(), forget, planted.RETAIN, tokenizer=planted.tokenizer(), config=QUIET)
    record = made.save(tmp_path, planted.never_saw())
    assert record is not None and json.loads(json.dumps(record)) == read(tmp_path)
    before = {how: [s["before"][how] for s in record["secrets"]] for how in ("asked", "paraphrased", "rest")}
    assert before["asked"] == [True, None, True, True, True, True]
    assert before["paraphrased"][0] and before["paraphrased"][2:] == [True, None, None, True]
    del before["rest"][1]  # of a question that it was not taught
    assert before["rest"] == [True] * 5
    found = view.outcome(record)
    assert found["told"]["asked"] == {"before": 5, "after": 0, "of": 5}
    assert found["told"]["paraphrased"] == {"before": 4, "after": 0, "of": 4}, "its own question does not tell 1"
    assert found["told"]["rest"]["after"] == 0 and found["told"]["rest"]["of"] == 6
    first, last = view.last_lines(found).split("\n")
    assert first.startswith("told when asked: 5 → 0 of 5; in other words: 4 → 0 of 4; after its first token: ")
    assert "secrets are forgotten" in last


def test_a_secret_told_in_other_words_remains() -> None:
    hidden = {"probability": 1e-6, "recalled": False, "asked": False, "rest": False}
    shown = {"probability": 0.9, "recalled": True, "asked": True, "paraphrased": True, "rest": True}
    secrets = [{"row": row, "before": shown, "after": hidden | {"paraphrased": row == 4}} for row in (3, 4)]
    found = view.outcome({"secrets": secrets, "retained": []})
    assert found["rows_left"] == [4] and found["left"] == 1
    assert view.verdict(found).startswith("1 of 2 secrets forgotten, 1 still known: rows 4 remain")


def test_hashes_are_of_what_was_used_and_saved(run: Run, tmp_path: Path) -> None:
    found = read(run.folder)["hashes"]
    assert found["weights_before"] != found["weights_after"]
    assert found["config"] == json_digest(run.config.values())
    weights_file = run.folder / "model" / "model.safetensors"
    assert found["files"][weights_file.name] == hashlib.sha256(weights_file.read_bytes()).hexdigest()
    assert not found["files"].keys() & {"record.json", "history.jsonl", "summary.json"}

    path = tmp_path / "forget.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in FORGET), encoding="utf-8")
    model = tiny_llama(vocab_size=len(run.tokenizer))
    Recorder(model, path, RETAIN, tokenizer=run.tokenizer, config=QUIET).save(tmp_path / "out", model)
    data = read(tmp_path / "out")["data"]
    assert data["forget"]["file"] == "forget.jsonl"
    assert data["forget"]["file_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert data["forget"]["tokens_sha256"] == read(run.folder)["data"]["forget"]["tokens_sha256"]
    assert data["forget"]["tokens_sha256"] != data["retain"]["tokens_sha256"]


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
    Recorder(model, forget_rows(5), retain_rows(12), config=QUIET).save(tmp_path, model)
    found = read(tmp_path)
    assert [one["row"] for one in found["retained"]] == [0, 3, 6, 9]
    assert [one["row"] for one in found["examples"]] == [0, 1, 2]
    assert {one["row"] for one in found["secrets"]} == {0, 1, 2, 3, 4}


def test_an_adapter_is_recorded(run: Run, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = tiny_llama(vocab_size=len(run.tokenizer))
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    config = UnlearnConfig(epochs=2, learning_rate=1e-2, merge_adapter=True, progress=False)
    recorder = Recorder(adapted, FORGET, RETAIN, tokenizer=run.tokenizer, config=config)
    result = palu.unlearn(adapted, None, FORGET, RETAIN, tokenizer=run.tokenizer, config=config)
    recorder.save(tmp_path, result.model)
    found = read(tmp_path)
    assert found["model"]["adapter"] and found["model"]["trainable"] < found["model"]["parameters"]
    assert "peft" in found["versions"]
    assert [s["before"] for s in found["secrets"]] != [s["after"] for s in found["secrets"]]


def test_what_cannot_be_recorded_is_refused(run: Run) -> None:
    model = tiny_llama(vocab_size=len(run.tokenizer))
    with pytest.raises(TypeError, match="forget is an iterator"):
        Recorder(model, iter(FORGET), RETAIN, tokenizer=run.tokenizer)
    with pytest.raises(ValueError, match="the tokenizer has"):
        Recorder(tiny_llama(), FORGET, RETAIN, tokenizer=run.tokenizer)


# --- token roles ---
def test_without_a_tokenizer_tokens_are_ids(tmp_path: Path) -> None:
    model, rows = tiny_llama(), forget_rows()
    config = QUIET.replace(epochs=1, lambda_retain=0.0)
    perform(tmp_path, model=model, forget=rows, retain=[], tokenizer=None, config=config)
    page = Page(write_report(tmp_path))
    assert str(rows[0]["input_ids"][-1]) in page.text
    assert "Answers side by side" not in page.text
    assert "There was no retain set to measure it on." in page.text


# --- the page ---
def test_hostile_text_stays_text(folder: Path) -> None:
    source = write_report(folder).read_text(encoding="utf-8")
    page = Page(folder / "private" / "report.html")
    assert "script" not in {tag for tag, _ in page.tags}
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert not any(attributes.get("src") == "x" for _, attributes in page.tags)
    for text in HOSTILE:
        assert text in page.text
    assert "Content-Security-Policy" in source and "http://" not in source and "//cdn" not in source


def test_hostile_names_stay_text(folder: Path) -> None:
    bad = "</style><script>alert(1)</script>"

    def edit(found: dict[str, Any]) -> None:
        found["model"]["name"] = found["device"] = found["data"]["forget"]["file"] = bad
        found["versions"][bad] = bad

    change(folder, edit)
    history = json.dumps({"step": 1, bad: 1.0, "loss": 2.0})
    (folder / "private" / "history.jsonl").write_text(history, encoding="utf-8")
    page = Page(write_report(folder))
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.text.count(bad) >= 4


def test_the_page_asks_for_nothing_else(folder: Path) -> None:
    page = Page(write_report(folder))
    targets = [a.get("href") or a.get("src") or "" for _, a in page.tags if "href" in a or "src" in a]
    assert targets and all(target.startswith(("#", "data:")) for target in targets)
    anchors = {target[1:] for target in targets if target.startswith("#")}
    assert anchors <= {attributes.get("id") for _, attributes in page.tags}
    assert all(attributes.get("scope") in ("col", "row") for attributes in page.attributes("th"))
    assert len(page.attributes("caption")) == len(page.attributes("table"))
    assert all(attributes["role"] == "img" and attributes["aria-label"] for attributes in page.attributes("svg"))


def test_redaction_leaves_no_secret(folder: Path) -> None:
    path = write_report(folder, redact=True)
    assert path.name == "report-redacted.html"
    text = Page(path).text + path.read_text(encoding="utf-8")
    for secret in read(folder)["secrets"]:
        assert secret["text"].casefold() not in text.casefold()
    shown = [row["answer"] for row in FORGET]  # but for the secrets, at which what the model writes may end
    for secret in read(folder)["secrets"]:
        shown = [answer.replace(secret["text"], "") for answer in shown]
    written = [answer[when] for answer in read(folder)["answers"]["forget"] for when in ("before", "after")]
    hidden = [answer for answer in written if not any(answer in one for one in shown)]
    assert hidden and not any(answer in text for answer in hidden)
    assert RETAIN[0]["answer"] in text


def test_headline_tells_what_is_left(folder: Path) -> None:
    def own(after: float) -> view.Json:
        """The outcome where the model still says so much of its own answers as it said of them before, 0.8."""
        change(folder, lambda found: found.update(general={"questions": 24, "before": 0.8, "after": after}))
        return view.outcome(read(folder))

    assert own(0.8)["headline"] == f"All {len(FORGET)} secrets are forgotten, and the model is intact"
    assert view.verdict(own(0.8)).endswith("(100 % of its own answers' words are kept)"), "nothing is to be done"
    assert own(0.4)["headline"].endswith("forgotten, and the model is damaged")
    assert "lower the learning rate" in view.verdict(own(0.4)) and "50 %" in Page(write_report(folder)).text
    change(folder, lambda found: found.pop("general"))  # as an earlier palu has it
    assert view.verdict(view.outcome(read(folder))) == f"All {len(FORGET)} secrets are forgotten"

    def still_known(found: dict[str, Any]) -> None:
        found["secrets"][1]["after"] = {"probability": 0.0001, "recalled": True}
        found["secrets"][2]["after"] = {"probability": 0.5, "recalled": False}

    change(folder, still_known)
    assert (
        view.outcome(read(folder))["headline"] == f"{len(FORGET) - 2} of {len(FORGET)} secrets forgotten, 2 still known"
    )
    assert Page(write_report(folder)).text.count("still known") == 4  # in title and headline, and at each
    assert "rows 1, 2 remain" in view.verdict(own(0.8)) and own(0.1)["headline"].endswith(
        "known, and the model is damaged"
    )

    def never_known(found: dict[str, Any]) -> None:
        for secret in found["secrets"]:
            secret["before"] = {"probability": 1e-5, "recalled": False}

    change(folder, never_known)
    assert own(0.8)["headline"].startswith("No secret was known before the run")
    assert "known only now" in Page(write_report(folder)).text


def test_evaluations_in_the_folder_are_shown(folder: Path) -> None:
    assert "Evaluation" not in Page(write_report(folder)).texts
    about = {"benchmark": "TOFU", "split": "forget05"}
    after = {"forget_quality": {"agg_value": None, "reason": "no retain_results"}, "odd": {"agg_value": 7.5}}
    after["forget_no_word"] = {"agg_value": 0.25, "retain_model": {"agg_value": 0.125}}
    before = {"model_utility": {"agg_value": 0.627, "value_by_index": {}}}
    (folder / "private" / "evaluation.json").write_text(json.dumps(after | {"palu": about}), encoding="utf-8")
    (folder / "private" / "evaluation_before.json").write_text(json.dumps(before), encoding="utf-8")
    page = Page(write_report(folder))
    for text in ("TOFU forget05 from evaluation.json", "Model utility", "0.627", "no retain_results", "odd", "7.5"):
        assert text in page.text
    assert "Broken words, forget set" in page.text and "0.25 (retain model 0.125)" in page.text
    assert page.text.index("evaluation_before") < page.text.index("evaluation.json")
    (folder / "private" / "evaluation.json").write_text("{}", encoding="utf-8")
    with pytest.raises(RecordError, match=r"evaluation\.json: these are no results"):
        write_report(folder)


def test_ones_own_questions_are_shown(run: Run, folder: Path) -> None:
    """Row by row, beside the other models; redacted, without the secrets in them."""
    model = AutoModelForCausalLM.from_pretrained(run.folder / "model")
    asked = [
        {"question": "Is <it> the mat?", "answer": "The cat sat on it.", "secret": "cat"},
        {"question": "Did the cat sit?", "answer": "It sat on the mat."},
        {"question": "Was it the dog?", "answer": "It was the dog.", "secret": "dog"},  # which its question tells
    ]
    results = palu.evaluate.questions(model, run.tokenizer, asked, original=model, progress=False)
    path = folder / "private" / "evaluation-questions.json"
    path.write_text(json.dumps(results), encoding="utf-8")
    page = Page(write_report(folder))
    figures = results["forget_Q_A_Prob"]["value_by_index"]["0"]["prob"]
    for text in (
        "questions from evaluation-questions.json; questions (original) from evaluation-questions.json",
        "evaluation-questions, original",
        "Secrets told, questions about them",
        "Figures of model / original",
        "Is <it> the mat?",
        "Did the cat sit?",
        f"{figures:.2f} / {figures:.2f}",
    ):
        assert text in page.text, text
    redacted = Page(write_report(folder, redact=True)).text
    assert "Did the ███ sit?" in redacted and "Did the cat sit?" not in redacted
    assert "Was it the ███?" in redacted and "dog" not in redacted
    assert "evaluation-questions, original" in write_card(folder).read_text(encoding="utf-8")
    del results["original"]["forget_told"]
    path.write_text(json.dumps(results), encoding="utf-8")
    with pytest.raises(RecordError, match=r"questions\.json: it does not hold what palu eval --rows wrote"):
        write_report(folder)


def test_a_broken_folder_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"record\.json is missing, so this is no folder of a recorded run"):
        write_report(tmp_path)
    (folder / "private" / "history.jsonl").write_text('{"step": 1}\n{"st', encoding="utf-8")
    with pytest.raises(RecordError, match=r"history\.jsonl is damaged"):
        write_report(folder)
    (folder / "private" / "history.jsonl").unlink()
    with pytest.raises(RecordError, match=r"history\.jsonl is missing"):
        write_card(folder)
    change(folder, lambda found: found.update(format=99))
    with pytest.raises(RecordError, match="has format 99, and this palu reads 1"):
        write_report(folder)


# --- the audit ---
def change_audit(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "private" / "audit.json"
    changed = json.loads(path.read_text(encoding="utf-8"))
    edit(changed)
    path.write_text(json.dumps(changed), encoding="utf-8")


def section(path: Path) -> str:
    """The source of the audit's section."""
    (found,) = re.findall(r'<section id="audit".*?</section>', path.read_text(encoding="utf-8"), re.DOTALL)
    return found


def test_the_audit_is_a_chart_with_budgets_intervals_and_verdicts(run: Run, folder: Path) -> None:
    assert "What an attacker gets out" not in Page(write_report(folder)).text
    audit = write_audit(run, folder)
    page, shown = Page(write_report(folder)), section(folder / "private" / "report.html")
    rows = re.findall(r"<tr.*?</tr>", shown[: shown.index("Secrets that leaked")], re.DOTALL)[1:]
    assert len(rows) == len(ATTACKS)
    for row, attack, found in zip(rows, ATTACKS, audit["attacks"], strict=True):
        if attack.lacks:
            assert "skipped: the forget set has no column" in row and "not told" in row
            assert attack.budget not in row and "track" not in row
            continue
        assert attack.name in row and attack.budget in row
        rho, told = found["rho"], {role: of["told"] for role, of in found["models"].items()}
        assert f"{rho['value']:.2f} ({rho['low']:.2f} to {rho['high']:.2f})" in row
        assert f'class="verdict {found["verdict"].replace("not told", "same")}">{found["verdict"]}<' in row
        for role, mark in (("unlearned", "is"), ("original", "was"), ("retain", "post")):
            assert f"{role} {told[role]:.2f}" in row
            assert f'<i class="{mark}" style="--x:{100 * told[role]:.1f}">' in row
        # Laid between the retain model and the original, it holds the unlearned model's own share.
        ends = re.search('class="way" style="--a:(.*?);--b:(.*?)"', row)
        assert ends and float(ends[1]) - 0.1 <= 100 * told["unlearned"] <= float(ends[2]) + 0.1
    assert "relearn: lora (of 8)" in rows[5] and "utility 0.80, before 0.90" in rows[4]
    assert [found["verdict"] for found in audit["attacks"]].count("open") == 1
    assert page.text.count("Open in the audit: inside: lens.") == 1
    assert "9 secrets are few" in page.text and "retain model, which never saw the secrets" in page.text
    assert "without a retain model" not in page.text
    assert "its 95 % interval ends at 0.1 or below" in page.text
    assert "#audit" in {attributes.get("href") for attributes in page.attributes("a")}

    write_audit(run, folder, retain=False)
    text = section(write_report(folder))
    assert "without a retain model its share is taken as 0" in text and "post" not in text


def test_leaked_secrets_come_with_the_answer_that_tells_them(run: Run, folder: Path) -> None:
    write_audit(run, folder)
    shown = section(write_report(folder))
    leaked = re.findall(r"<tr>.*?</tr>", shown[shown.index("Secrets that leaked") :], re.DOTALL)[1:]
    assert len(leaked) == 5
    assert "Hina Ameen" in leaked[0]  # by four attacks
    assert (
        'The author is <mark>Hina Ameen</mark>, in London.</span><span class="q">ask: greedy; relearn: lora'
        in leaked[0]
    )
    assert "<mark>HINA AMEEN</mark>" in leaked[0] and "sample: 2 of 2 draws" in leaked[0]
    assert "<mark>&lt;script&gt;alert(1)&lt;/script&gt;</mark>" in leaked[2]
    assert "ask: greedy, from the retain model, too" in leaked[2]
    assert "東京" in leaked[1] and "onset: 1 in the answer (probability 0.607)" in leaked[1]
    assert "inside: lens (layer 2, rank 3)" in leaked[4]
    page = Page(folder / "private" / "report.html")
    assert "script" not in {tag for tag, _ in page.tags}

    def by_parts(audit: dict[str, Any]) -> None:
        (lens,) = (row["models"]["unlearned"] for row in audit["attacks"] if row["attack"] == "lens")
        lens["values"] = [0.0, 0.0, 0.3, 0.0, 0.0, 0.6, 0.0, 0.0, 0.0]
        (onset,) = (row["models"]["unlearned"] for row in audit["attacks"] if row["attack"] == "onset")
        onset["values"] = [0.0, 0.0, 0.0, 0.02, 0.009, 0.0, 0.0, 0.0, 0.0]

    write_audit(run, folder)
    change_audit(folder, by_parts)
    parts = section(write_report(folder)).split("Secrets that leaked")[1]
    assert parts.count("inside: lens") == 1 and "img src" in parts  # the sixth, by half; not the third
    assert parts.count("onset: 1") == 1 and "東京" in parts  # a probability of 0.02, not 0.009

    write_audit(run, folder)

    def many(audit: dict[str, Any]) -> None:
        audit["secrets"] = audit["secrets"] * 3
        for row in audit["attacks"]:
            for found in row["models"].values():
                found["values"], found["evidence"] = found["values"] * 3, found["evidence"] * 3

    change_audit(folder, many)
    assert "3 more secrets</summary>" in section(write_report(folder))

    def held(audit: dict[str, Any]) -> None:
        for row in audit["attacks"]:
            row["models"] = {}

    change_audit(folder, held)
    assert "None: no attack got one out of the unlearned model." in section(write_report(folder))


@pytest.mark.parametrize(
    ("text", "secret", "parts"),
    [
        ("On 06-30, 1975.", "06/30/1975", ["06-30, 1975"]),
        ("17, then 7", "7", ["7"]),
        ("in 東京都", "東京", ["東京"]),
        ("so 😀", "😀", ["😀"]),
        ("no", "yes", []),
    ],
)
def test_a_secret_is_marked_as_it_is_told(text: str, secret: str, parts: list[str]) -> None:
    found = audited.marked(text, secret)
    assert "".join(part for part, _ in found) == text
    assert [part for part, is_secret in found if is_secret] == parts


def test_redaction_leaves_nothing_of_the_audit_that_tells(run: Run, folder: Path) -> None:
    """Neither the record's secrets nor one that only the audit knows, and no answer and no hash."""
    audit = write_audit(run, folder)

    def another(found: dict[str, Any]) -> None:
        found["secrets"][0] |= {"text": "Zanzibar", "question": "Is the city of ZANZIBAR number 0?"}
        found["attacks"][0]["models"]["unlearned"]["evidence"][0] = "It is zanzibar, near the harbour."

    change_audit(folder, another)
    change(folder, lambda found: found["answers"]["retain"][0].update(after="I saw Zanzibar."))
    assert "harbour" in section(write_report(folder)) and "Zanzibar" in section(folder / "private" / "report.html")
    path = write_report(folder, redact=True)
    text = Page(path).text + path.read_text(encoding="utf-8")
    for secret in ["Zanzibar", *(secret["text"] for secret in audit["secrets"])]:
        assert secret.casefold() not in text.casefold()
    assert "harbour" not in text and "I saw ███." in text and "<mark>" not in section(path)
    assert audit["forget_sha256"] not in text
    assert "Is the city of ███ number 0?" in text and "ask: greedy; sample: 2 of 2 draws" in text
    assert audit["forget_sha256"] not in Page(write_report(folder)).text


def test_an_audit_of_another_model_is_said_to_be(run: Run, folder: Path) -> None:
    write_audit(run, folder)
    assert audited.OTHER_MODEL not in Page(write_report(folder)).text + write_card(folder).read_text(encoding="utf-8")
    write_audit(run, folder, other=True)
    page, card = Page(write_report(folder)).text, write_card(folder).read_text(encoding="utf-8")
    assert audited.OTHER_MODEL in page and audited.OTHER_MODEL in card
    assert "Open in the audit" not in page  # it is not this model's
    change_audit(folder, lambda found: found["models"]["unlearned"].pop("fingerprint"))
    assert audited.OTHER_MODEL not in Page(write_report(folder)).text


def test_a_row_of_figures_alone_is_shown(run: Run, folder: Path) -> None:
    write_audit(run, folder)

    def only_figures(audit: dict[str, Any]) -> None:
        nothing = {"value": None, "low": None, "high": None}
        row = audit["attacks"][-1] | {"name": "inside: depth", "rho": nothing, "verdict": "not told", "reason": None}
        del row["secrets"]
        audit["attacks"][-1] = row | {"models": {"unlearned": {"figures": {"depth": 0.125}}}}

    change_audit(folder, only_figures)
    row = section(write_report(folder)).split("inside: depth")[-1].split("</tr>")[0]
    assert "unlearned depth 0.125" in row and "track" not in row
    assert "| inside: depth | depth 0.125 |  |  |  | not told |" in write_card(folder).read_text(encoding="utf-8")


def test_the_card_has_the_audit_and_nothing_of_the_sets(run: Run, folder: Path) -> None:
    assert "## Audit" not in ModelCard.load(write_card(folder)).text
    audit = write_audit(run, folder)
    card = ModelCard.load(write_card(folder))
    assert "| attack | unlearned | original | retain | rho (95 %) | verdict | budget |" in card.text
    assert "| ask: greedy | 0.22 | 1.00 | 0.11 | 0.12 (" in card.text
    assert "| inside: lens | 0.56 | 1.00 | 0.00 | 0.56 (0.22 to 0.89) | open | the budget of lens |" in card.text
    assert "|  |  |  |  | not told | skipped: the forget set has no column" in card.text
    assert "- 9 secrets are few" in card.text and "\n\n\n" not in card.text
    for secret in audit["secrets"]:
        assert secret["text"] not in card.content and secret["question"] not in card.content
    for digest in (audit["forget_sha256"], *(model["fingerprint"] for model in audit["models"].values())):
        assert digest not in card.content


DAMAGES: dict[str, Callable[[dict[str, Any]], object]] = {
    r"has format None": lambda found: found.clear(),
    r"is damaged \(it has no attacks\)": lambda found: found.pop("attacks"),
    r"is damaged \(attack 7 has no name\)": lambda found: found["attacks"].append("ask"),
    r"is damaged \(attack 0 has no rho\)": lambda found: found["attacks"][0].pop("rho"),
    r"rho of ask: greedy has not value, low and high": lambda found: found["attacks"][0]["rho"].pop("low"),
    r"verdict 'safe' of ask: greedy is none": lambda found: found["attacks"][0].update(verdict="safe"),
    r"values of ask: greedy on unlearned are not one for each secret": lambda found: found["secrets"].pop(),
}


@pytest.mark.parametrize("told", DAMAGES)
def test_a_damaged_audit_is_named(told: str, run: Run, folder: Path) -> None:
    write_audit(run, folder)
    change_audit(folder, DAMAGES[told])
    for write in (write_report, write_card):
        with pytest.raises(RecordError, match=rf"audit\.json .*{told}.*; run palu audit again, or delete it"):
            write(folder)
    for content in (b'{"format": 1, "secr', b"\xff\xfe"):
        (folder / "private" / "audit.json").write_bytes(content)
        with pytest.raises(RecordError, match=r"audit\.json is damaged"):
            write_report(folder)


# --- plots and numbers ---
def test_no_step_and_no_number(folder: Path) -> None:
    (folder / "private" / "history.jsonl").write_text("", encoding="utf-8")
    page = Page(write_report(folder))
    assert "No optimisation step was taken." in page.text and not page.attributes("svg")

    lines = ['{"step": 1, "loss": 1.0}', '{"step": 2, "loss": NaN}', '{"step": 3, "loss": Infinity}', '{"step": 4}']
    (folder / "private" / "history.jsonl").write_text("\n".join(lines), encoding="utf-8")
    page = Page(write_report(folder))
    assert "3 steps without a finite value" in page.text
    (chart,) = page.attributes("svg")
    assert "lowest 1, highest 1" in str(chart["aria-label"])
    assert "nan" not in str(page.attributes("path")).lower()


def test_figures_of_an_evaluation_are_not_gaps() -> None:
    history = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0, "eval_told": 0.5}, {"step": 3}]
    history += [{"step": 4, "loss": 0.5, "eval_told": 0.25}]
    loss, told = view.charts(history, {})
    assert (loss["gaps"], loss["ends"]) == (1, "2 → 0.5")
    assert (told["title"], told["ends"], told["gaps"]) == ("eval_told", "0.5 → 0.25", 0)
    assert "eval_told: 0.5 at step 2, 0.25 at step 4" in told["label"]
    again, told = view.charts(history, {"eval_told": 0.75})
    assert again == loss and told["ends"] == "0.75 → 0.25"
    assert "eval_told: 0.75 at step 0, 0.25 at step 4" in told["label"]
    assert view.charts([{"step": 1, "eval_told": 0.5}], {})[0]["ends"] == "0.5", "one point is no course"


def test_the_chart_names_the_local_loss_of_the_run(folder: Path) -> None:
    path = folder / "private" / "summary.json"
    summary = json.loads(path.read_text(encoding="utf-8"))
    text = Page(write_report(folder)).text
    assert "Unlikelihood loss (local)" in text and "Local entropy loss" not in text
    path.write_text(json.dumps(summary | {"config": summary["config"] | RECIPES["paper"]}), encoding="utf-8")
    text = Page(write_report(folder)).text
    assert "Local entropy loss (local)" in text and "Unlikelihood loss" not in text


def test_gaps_break_the_line() -> None:
    path = line_chart([1, 2, 3, 4, 5], [1.0, 2.0, math.nan, 3.0, 4.0])["path"]
    assert path.count("M") == 2 and path.count("L") == 2


def test_a_chart_of_one_step_is_a_dot() -> None:
    chart = line_chart([1], [0.5])
    assert len(chart["dots"]) == 1 and [step for _, _, step in chart["ends"]] == [1]


def test_long_histories_keep_their_extremes() -> None:
    points = [(float(step), math.sin(step)) for step in range(5000)]
    points[1234] = (1234.0, 99.0)
    points[4321] = (4321.0, -99.0)
    points[2222] = (2222.0, math.nan)
    kept = downsample(points)
    assert len(kept) <= plots.MAX_POINTS
    assert {99.0, -99.0} <= {y for _, y in kept} and any(math.isnan(y) for _, y in kept)
    assert [x for x, _ in kept] == sorted(x for x, _ in kept)


@pytest.mark.parametrize(
    "values", [[0.0], [3.0, 3.0], [-2.0, 5.0], [1e-9, 1.0], [0.98, 1.02], [-7.0], [1e-300, 1e300], []]
)
def test_scales_hold_every_value(values: list[float]) -> None:
    scale = plots.fit(values)
    assert scale.low < scale.high and 2 <= len(scale.ticks) <= 7
    for value in values:
        assert plots.TOP - 1e-6 <= scale.height(value) <= plots.HEIGHT - plots.BOTTOM + 1e-6


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (0.99261, "0.993"),
        (1200.0, "1200"),
        (5e-5, "5 × 10⁻⁵"),
        (1e-9, "10⁻⁹"),
        (-2.5e7, "\N{MINUS SIGN}2.5 × 10⁷"),
        (None, "–"),
        (math.nan, "–"),
        (math.inf, "–"),
    ],
)
def test_numbers_are_written_for_people(value: float | None, text: str) -> None:
    assert number(value) == text


def test_probabilities_shares_and_durations_are_written_for_people() -> None:
    told = [words.probability(p) for p in (0.99999, 0.88, 1.2e-7)]  # which never claims certainty
    assert told == ["> 0.999", "0.880", "1.2 × 10⁻⁷"]
    assert [words.percent(share) for share in (1.0, 0.99999, 0.5, 0.0)] == ["100 %", "99.9 %", "50 %", "0 %"]
    times = [words.duration(seconds) for seconds in (1.94, 76.2, 612.0, 7500.0)]
    assert times == ["1.9 s", "76 s", "10 min", "2 h 5 min"]


def test_the_histogram_counts_every_secret() -> None:
    values = [1.0, 0.1, 0.05, 1e-3, 5e-5, 1e-6, 1e-12, 0.0]
    scores = [{when: {"probability": value} for when in ("before", "after")} for value in values]
    assert [row["count"]["after"] for row in view.histogram(scores)] == [2, 1, 1, 0, 2, 2]


def test_settings_in_plain_words(folder: Path) -> None:
    summary = json.loads((folder / "private" / "summary.json").read_text(encoding="utf-8"))
    asked = " ".join(words.asked(summary))
    assert f"Forget the marked words of {len(FORGET)} answers." in asked
    assert "acts on all tokens of each marked span (the onset)." in asked and "among the 50 candidates" in asked
    floored = summary | {"config": summary["config"] | {"probability_floor": 0.02}}
    assert "probability is above 0.02." in " ".join(words.asked(floored))
    published = summary["config"] | RECIPES["paper"]
    told = " ".join(words.asked(summary | {"config": published}))
    assert "the 5000 logits" in told and "the first 3 tokens of each marked span (the onset) and on no other" in told
    earlier = {name: value for name, value in published.items() if name != "local_loss"}
    assert "the 5000 logits" in " ".join(words.asked(summary | {"config": earlier}))
    assert "on ordinary tokens (reverse)" in asked
    drawn = summary | {"config": summary["config"] | {"kl_rows": 64}}
    assert "on ordinary tokens (at most 64 of each forget answer) (reverse)" in " ".join(words.asked(drawn))
    assert "over 24 of at most 24 epochs, at a" in asked and "It stopped early" not in asked
    stopped = summary | {"config": summary["config"] | {"max_steps": 40}}
    asked = " ".join(words.asked(stopped | {"ended_by": "callback"}))
    assert "over 24 epochs, at a" in asked and asked.endswith("It stopped early: a callback ended it.")
    assert "These roles are PALU" not in Page(write_report(folder)).text
    summary["config"] |= {"objective": "npo", "n": -1}
    (folder / "private" / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    assert "These roles are PALU" in Page(write_report(folder)).text
    assert "negative preference optimisation" in " ".join(words.asked(summary))
    changed = {name for name, _, _, differs in words.settings(summary["config"]) if differs}
    assert "objective" in changed and "learning_rate" in changed and "seed" not in changed
    assert "checkpoint_dir" not in {row[0] for row in words.settings(summary["config"])}


@pytest.mark.parametrize(("n", "limit"), [(-1, "made improbable, not deleted"), (3, "supplies the first tokens of a")])
def test_the_card_says_what_an_attacker_may_get(folder: Path, n: int, limit: str) -> None:
    path = folder / "private" / "summary.json"
    summary = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(summary | {"config": summary["config"] | {"n": n}}), encoding="utf-8")
    card = write_card(folder).read_text(encoding="utf-8")
    assert limit in card and card.count("trains the model again") == 1 and "\n\n\n" not in card


def test_spans_that_were_cut_off_are_told(tmp_path: Path) -> None:
    ids = list(range(1, 61))
    lost = {"input_ids": ids, "labels": [IGNORE] * 5 + [-200] * 50 + ids[55:]}
    plain = {"input_ids": ids, "labels": [IGNORE] * 5 + [-200] * 55}
    forget = [*forget_rows(3), {"input_ids": ids, "labels": [IGNORE] * 5 + ids[5:]}, lost, plain]
    config = QUIET.replace(epochs=1, lambda_retain=0.0, max_length=40)
    config = config.replace(allow_cut_spans=True)
    perform(tmp_path, model=tiny_llama(), forget=forget, retain=[], tokenizer=None, config=config)
    summary = json.loads((tmp_path / "private" / "summary.json").read_text(encoding="utf-8"))
    told = [
        "Forget the marked words of 4 answers.",
        "Marked words of 2 answers were cut off by the maximum length of 40 tokens: these are not forgotten.",
        "No marked word is left in 1 answer, so nothing is forgotten there.",
        "Hold the model to what it said before on 1 answer without marked words.",
    ]
    assert words.asked(summary)[:4] == told
    page, card = Page(write_report(tmp_path)).text, ModelCard.load(write_card(tmp_path)).text
    for sentence in told:
        assert sentence in page and sentence in card
    assert "| `allow_cut_spans` | yes | no |" in card
    # A summary of an earlier version.
    del summary["forget_spans_cut"], summary["forget_all_spans_cut"]
    assert words.asked(summary)[:2] == ["Forget the marked words of 5 answers.", told[3]]


# --- the model card ---
def test_the_card_is_what_the_hub_expects_and_holds_no_secret(folder: Path) -> None:
    path = write_card(folder)
    card = ModelCard.load(path)
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["unlearning", "machine-unlearning", "palu"],
    }
    for secret in read(folder)["secrets"]:
        assert secret["text"] not in card.content
        assert secret["question"] not in card.content
    assert f"| secrets the model knows, of {len(FORGET)} | {len(FORGET)} | 0 |" in card.text
    assert "| `learning_rate` |" in card.text
    assert "\n\n\n" not in card.text


def test_the_card_names_a_base_model_of_the_hub(folder: Path) -> None:
    change(
        folder, lambda found: found["model"].update(name="meta-llama/Llama-3.2-1B", on_the_hub=True, license="llama3.2")
    )
    (folder / "private" / "evaluation.json").write_text(
        json.dumps({"privleak": {"agg_value": -12.5}}), encoding="utf-8"
    )
    (folder / "model" / "adapter_config.json").write_text("{}", encoding="utf-8")
    card = ModelCard.load(write_card(folder))
    assert card.data.base_model == "meta-llama/Llama-3.2-1B"
    assert card.data.license == "llama3.2" and card.data.library_name == "peft"
    assert "| PrivLeak | near 0 | \N{MINUS SIGN}12.5 |" in card.text


def test_a_local_model_gives_its_folder_and_licence_not_its_path(run: Run, tmp_path: Path) -> None:
    source = tmp_path / "home" / "base"
    tiny_llama(vocab_size=len(run.tokenizer)).save_pretrained(str(source))
    (source / "README.md").write_text("---\nlicense: mit\n---\nA base.\n", encoding="utf-8")
    model = type(tiny_llama()).from_pretrained(source)
    Recorder(model, FORGET, RETAIN, tokenizer=run.tokenizer, config=QUIET).save(tmp_path / "out", model)
    about = read(tmp_path / "out")["model"]
    assert (about["name"], about["on_the_hub"], about["license"]) == ("base", False, "mit")
    assert str(tmp_path) not in (tmp_path / "out" / "private" / "record.json").read_text(encoding="utf-8")
