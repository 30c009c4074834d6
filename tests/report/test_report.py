"""Report and model card, without a browser: what they say, their charts, and that no text can break the page."""

import math
from pathlib import Path
from typing import Any

import pytest
from helpers.report_runs import FORGET, HOSTILE, RETAIN, Page, Run, change, perform, read, write
from helpers.tiny import forget_rows, tiny_llama
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

import palu
from palu import UnlearnConfig, write_card, write_report
from palu.data.tokenize import IGNORE
from palu.methods.palu import RECIPES
from palu.report import plots, view, words
from palu.report.plots import line_chart, number
from palu.report.reading import RecordError


def asked(folder: Path, summary: dict[str, Any], **config: Any) -> str:
    """What the report says of what was asked, where the run's summary and settings had other values."""
    write(folder, summary | {"config": summary["config"] | config}, "summary.json")
    text = Page(write_report(folder)).text
    card = write_card(folder).read_text(encoding="utf-8")
    sentences = card.split("## What was done\n\n- ")[1].split("\n\n")[0].split("\n- ")
    assert all(sentence in text for sentence in sentences)
    return " ".join(sentences)


# --- no text breaks the page ---
def test_hostile_text_stays_text(folder: Path) -> None:
    path = write_report(folder)
    source, page = path.read_text(encoding="utf-8"), Page(path)
    assert "script" not in {tag for tag, _ in page.tags}
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert not any(attributes.get("src") == "x" for _, attributes in page.tags)
    assert all(text in page.text for text in HOSTILE)
    assert "Content-Security-Policy" in source and "http://" not in source and "//cdn" not in source
    # It asks for nothing else, and is to be read by machines.
    targets = [a.get("href") or a.get("src") or "" for _, a in page.tags if "href" in a or "src" in a]
    assert targets and all(target.startswith(("#", "data:")) for target in targets)
    anchors = {target[1:] for target in targets if target.startswith("#")}
    assert anchors <= {attributes.get("id") for _, attributes in page.tags}
    assert all(attributes.get("scope") in ("col", "row") for attributes in page.attributes("th"))
    assert len(page.attributes("caption")) == len(page.attributes("table"))
    assert all(attributes["role"] == "img" and attributes["aria-label"] for attributes in page.attributes("svg"))

    bad = "</style><script>alert(1)</script>"

    def rename(found: dict[str, Any]) -> None:
        found["model"]["name"] = found["device"] = found["data"]["forget"]["file"] = bad
        found["versions"][bad] = bad

    change(folder, rename)
    write(folder, {"step": 1, bad: 1.0, "loss": 2.0}, "history.jsonl")
    page = Page(write_report(folder))
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.text.count(bad) >= 4


# --- what is shown ---
def test_what_was_trained(folder: Path) -> None:
    """A merged adapter is named, and all weights are not said to be trained; an adapter of the model's own is not."""
    summary, record = read(folder, "summary.json"), read(folder)
    trained = f"({record['model']['trainable']:,} trained)"
    assert "LoRA" not in asked(folder, summary) and trained in Page(write_report(folder)).text
    assert "A LoRA adapter of rank 8 was trained, and merged into the weights" in asked(folder, summary, lora_rank=8)
    assert trained not in Page(write_report(folder)).text
    change(folder, lambda found: found["model"].update(adapter=True))
    assert "LoRA" not in asked(folder, summary, lora_rank=8) and trained in Page(write_report(folder)).text


def test_redaction_leaves_no_secret(folder: Path) -> None:
    path = write_report(folder, redact=True)
    assert path.name == "report-redacted.html"
    text = Page(path).text + path.read_text(encoding="utf-8")
    found = read(folder)
    shown = [row["answer"] for row in FORGET]  # but for the secrets, at which what the model writes may end
    for secret in found["secrets"]:
        assert secret["text"].casefold() not in text.casefold()
        shown = [answer.replace(secret["text"], "") for answer in shown]
    written = [answer[when] for answer in found["answers"]["forget"] for when in ("before", "after")]
    hidden = [answer for answer in written if not any(answer in one for one in shown)]
    assert hidden and not any(answer in text for answer in hidden)
    assert RETAIN[0]["answer"] in text


def test_headline_tells_what_is_left(folder: Path) -> None:
    count = len(FORGET)

    def own(after: float) -> view.Json:
        """The outcome where the model still says so much of its own answers as it said of them before, 0.8."""
        change(folder, lambda found: found.update(general={"questions": 24, "before": 0.8, "after": after}))
        return view.outcome(read(folder))

    assert own(0.8)["headline"] == f"All {count} secrets are forgotten, and the model is intact"
    assert view.verdict(own(0.8)).endswith("(100 % of its own answers' words are kept)"), "nothing is to be done"
    assert own(0.4)["headline"].endswith("forgotten, and the model is damaged")
    assert "lower the learning rate" in view.verdict(own(0.4)) and "50 %" in Page(write_report(folder)).text
    change(folder, lambda found: found["general"].update(before=None, after=None))  # as without a tokenizer
    assert view.verdict(view.outcome(read(folder))) == f"All {count} secrets are forgotten"

    def still_known(found: dict[str, Any]) -> None:
        found["secrets"][1]["after"] = {"probability": 0.0001, "recalled": True}
        found["secrets"][2]["after"] = {"probability": 0.5, "recalled": False}

    change(folder, still_known)
    assert view.outcome(read(folder))["headline"] == f"{count - 2} of {count} secrets forgotten, 2 still known"
    assert Page(write_report(folder)).text.count("still known") == 4  # in title and headline, and at each
    assert "rows 1, 2 remain" in view.verdict(own(0.8))
    assert own(0.1)["headline"].endswith("known, and the model is damaged")

    def never_known(found: dict[str, Any]) -> None:
        for secret in found["secrets"]:
            secret["before"] = {"probability": 1e-5, "recalled": False}

    change(folder, never_known)
    assert own(0.8)["headline"].startswith("0 of 2 secrets forgotten, 2 still known"), "they have come with the run"
    assert "known only now" in Page(write_report(folder)).text


def test_a_secret_told_in_other_words_remains() -> None:
    hidden = {"probability": 1e-6, "recalled": False, "asked": False, "rest": False}
    shown = {"probability": 0.9, "recalled": True, "asked": True, "paraphrased": True, "rest": True}
    secrets = [{"row": row, "before": shown, "after": hidden | {"paraphrased": row == 4}} for row in (3, 4)]
    found = view.outcome({"secrets": secrets, "retained": [], "general": {"before": None}})
    assert found["rows_left"] == [4] and found["left"] == 1
    assert view.verdict(found).startswith("1 of 2 secrets forgotten, 1 still known: rows 4 remain")


def test_requests_in_sequence(folder: Path) -> None:
    """A request whose secret has come back is in the headline; the ledger's table says how each request stands."""
    assert "how its own run met it" not in Page(write_report(folder)).text, "there is one request alone"
    (first,) = read(folder, "ledger.json")["requests"]
    assert first["proof"] == first["now"] and first["proof"]["known"] == {"before": len(FORGET), "after": 0}

    def second(found: dict[str, Any]) -> None:
        """The last two secrets are of an earlier request: unknown before this run, and one is known now."""
        found["general"].update(before=None, after=None)
        for secret in found["secrets"]:
            secret["request"] = 2
        for secret, after in zip(found["secrets"][-2:], (0.5, 1e-6), strict=True):
            secret |= {"request": 1, "before": {"probability": 1e-5, "recalled": False, "asked": False}}
            secret["after"] = {"probability": after, "recalled": False, "asked": after > 0.1}

    change(folder, second)
    record, count = read(folder), len(FORGET) - 2
    headline = f"{count} of {count + 1} secrets forgotten, 1 still known; 1 of 2 earlier secrets is known"
    assert view.outcome(record)["headline"] == headline and f"rows {count} remain" in view.verdict(view.outcome(record))
    earlier = {"number": 1, "run": f"of {FORGET[0]['answer']}", "rows": 2, "rows_sha256": "ab" * 32, "finished": "then"}
    proof = {"secrets": 2, "known": {"before": 2, "after": 0}, "told": {}, "highest": 0.004}
    requests = view.proven([earlier | {"weights_after": "cd" * 32, "proof": proof}, first | {"number": 2}], record)
    assert requests[0]["proof"] == proof and requests[0]["now"]["known"] == {"before": 0, "after": 1}
    write(folder, {"format": 1, "requests": requests}, "ledger.json")
    page = Page(write_report(folder)).text
    assert "1 of 2" in page and "ab" * 32 in page and headline in page and earlier["run"] in page
    redacted = Page(write_report(folder, redact=True)).text
    assert "how its own run met it" in redacted and "cd" * 32 in redacted
    assert "ab" * 32 not in redacted and FORGET[0]["answer"] not in redacted, "a hash tells a short secret"


def test_what_was_asked_is_said(folder: Path) -> None:
    summary = read(folder, "summary.json")
    text = asked(folder, summary)
    assert f"Forget the marked words of {len(FORGET)} answers." in text
    assert "acts on all tokens of each marked span (the onset)." in text and "among the 50 candidates" in text
    assert "on ordinary tokens (reverse)" in text
    assert "over 24 of at most 24 epochs, at a" in text and "It stopped early" not in text
    text = asked(folder, summary, probability_floor=0.02, kl_rows=64)
    assert "probability is above 0.02." in text
    assert "on ordinary tokens (at most 64 of each forget answer) (reverse)" in text
    text = asked(folder, summary | {"ended_by": "callback"}, max_steps=40)
    assert "over 24 epochs, at a" in text and text.endswith("It stopped early: a callback ended it.")
    page = Page(write_report(folder)).text
    assert "These roles are PALU" not in page
    assert "Unlikelihood loss (local)" in page and "Local entropy loss" not in page
    assert "made improbable, not deleted" in write_card(folder).read_text(encoding="utf-8")

    text = asked(folder, summary, **RECIPES["paper"])
    assert "the 5000 logits" in text and "the first 3 tokens of each marked span (the onset) and on no other" in text
    page = Page(write_report(folder)).text
    assert "Local entropy loss (local)" in page and "Unlikelihood loss" not in page
    card = write_card(folder).read_text(encoding="utf-8")
    assert "supplies the first tokens of a" in card and card.count("trains the model again") == 1

    npo = UnlearnConfig("npo", epochs=24).values()
    assert "negative preference optimisation" in asked(folder, summary | {"config": npo})
    assert "These roles are PALU" in Page(write_report(folder)).text


def test_settings_that_differ_from_the_defaults(run: Run) -> None:
    settings = words.settings(run.config.values() | {"objective": "npo"})
    changed = {name for name, _, _, differs in settings if differs}
    assert "objective" in changed and "learning_rate" in changed and "seed" not in changed
    assert "checkpoint_dir" not in {row[0] for row in settings}


def test_without_a_tokenizer_tokens_are_ids_and_spans_that_were_cut_off_are_told(tmp_path: Path) -> None:
    ids = list(range(1, 61))
    lost = {"input_ids": ids, "labels": [IGNORE] * 5 + [-200] * 50 + ids[55:]}
    plain = {"input_ids": ids, "labels": [IGNORE] * 5 + [-200] * 55}
    forget = [*forget_rows(3), {"input_ids": ids, "labels": [IGNORE] * 5 + ids[5:]}, lost, plain]
    config = UnlearnConfig(progress=False, epochs=1, lambda_retain=0.0, max_length=40, allow_cut_spans=True)
    perform(tmp_path, model=tiny_llama(), forget=forget, retain=[], tokenizer=None, config=config)
    assert asked(tmp_path, read(tmp_path, "summary.json")).startswith(
        "Forget the marked words of 4 answers. "
        "Marked words of 2 answers were cut off by the maximum length of 40 tokens: these are not forgotten. "
        "No marked word is left in 1 answer, so nothing is forgotten there. "
        "Hold the model to what it said before on 1 answer without marked words. "
    )
    assert "| `allow_cut_spans` | yes | no |" in ModelCard.load(write_card(tmp_path)).text
    text = Page(write_report(tmp_path)).text
    assert str(forget[0]["input_ids"][-1]) in text and "Answers side by side" not in text
    assert "There was no retain set to measure it on." in text


def test_no_step_and_no_number(folder: Path) -> None:
    history = folder / "private" / "history.jsonl"
    history.write_text("", encoding="utf-8")
    page = Page(write_report(folder))
    assert "No optimisation step was taken." in page.text and not page.attributes("svg")

    lines = ['{"step": 1, "loss": 1.0}', '{"step": 2, "loss": NaN}', '{"step": 3, "loss": Infinity}', '{"step": 4}']
    history.write_text("\n".join(lines), encoding="utf-8")
    page = Page(write_report(folder))
    assert "3 steps without a finite value" in page.text
    (chart,) = page.attributes("svg")
    assert "lowest 1, highest 1" in str(chart["aria-label"])
    assert "nan" not in str(page.attributes("path")).lower()


# --- evaluations ---
def test_evaluations_in_the_folder_are_shown(folder: Path) -> None:
    assert "Metrics" not in Page(write_report(folder)).text
    about = {"benchmark": "TOFU", "split": "forget05"}
    after = {"forget_quality": {"agg_value": None, "reason": "no retain_results"}, "odd": {"agg_value": 7.5}}
    after["forget_no_word"] = {"agg_value": 0.25, "retain_model": {"agg_value": 0.125}}
    write(folder, after | {"palu": about}, "evaluation.json")
    write(folder, {"model_utility": {"agg_value": 0.627, "value_by_index": {}}}, "evaluation_before.json")
    text = Page(write_report(folder)).text
    for shown in ("TOFU forget05 from evaluation.json", "Model utility", "0.627", "no retain_results", "odd", "7.5"):
        assert shown in text
    assert "Broken words, forget set" in text and "0.25 (retain model 0.125)" in text
    assert text.index("evaluation_before") < text.index("evaluation.json")
    write(folder, {}, "evaluation.json")
    with pytest.raises(RecordError, match=r"evaluation\.json: these are no results"):
        write_report(folder)


def test_ones_own_questions_are_shown(run: Run, folder: Path) -> None:
    """Row by row, beside the other models; redacted, without the secrets in them."""
    model = AutoModelForCausalLM.from_pretrained(run.folder / "model")
    rows = [
        {"question": "Is <it> the mat?", "answer": "The cat sat on it.", "secret": "cat"},
        {"question": "Did the cat sit?", "answer": "It sat on the mat."},
        {"question": "Was it the dog?", "answer": "It was the dog.", "secret": "dog"},  # which its question tells
    ]
    results = palu.evaluate.questions(model, run.tokenizer, rows, original=model, progress=False)
    write(folder, results, "evaluation-questions.json")
    text = Page(write_report(folder)).text
    figure = results["forget_Q_A_Prob"]["value_by_index"]["0"]["prob"]
    for shown in (
        "questions from evaluation-questions.json; questions (original) from evaluation-questions.json",
        "evaluation-questions, original",
        "Secrets told, questions about them",
        "Figures of model / original",
        "Is <it> the mat?",
        "Did the cat sit?",
        f"{figure:.2f} / {figure:.2f}",
    ):
        assert shown in text, shown
    redacted = Page(write_report(folder, redact=True)).text
    assert "Did the ███ sit?" in redacted and "Did the cat sit?" not in redacted
    assert "Was it the ███?" in redacted and "dog" not in redacted
    assert "evaluation-questions, original" in write_card(folder).read_text(encoding="utf-8")
    del results["original"]["forget_told"]
    write(folder, results, "evaluation-questions.json")
    with pytest.raises(RecordError, match=r"questions\.json: it does not hold what palu eval --rows wrote"):
        write_report(folder)


def test_a_broken_folder_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"record\.json is missing, so this is no folder of a recorded run"):
        write_report(tmp_path)
    history = folder / "private" / "history.jsonl"
    history.write_text('{"step": 1}\n{"st', encoding="utf-8")
    with pytest.raises(RecordError, match=r"history\.jsonl is damaged"):
        write_report(folder)
    history.unlink()
    with pytest.raises(RecordError, match=r"history\.jsonl is missing"):
        write_card(folder)
    change(folder, lambda found: found.update(format=99))
    with pytest.raises(RecordError, match="has format 99, and this palu reads 3"):
        write_report(folder)


# --- the model card ---
def test_the_card_is_what_the_hub_expects_and_holds_no_secret(folder: Path) -> None:
    card = ModelCard.load(write_card(folder))
    tags = {"pipeline_tag": "text-generation", "tags": ["unlearning", "machine-unlearning", "palu"]}
    assert card.data.to_dict() == {"library_name": "transformers", **tags}
    for secret in read(folder)["secrets"]:
        assert secret["text"] not in card.content and secret["question"] not in card.content
    assert f"| secrets the model knows, of {len(FORGET)} | {len(FORGET)} | 0 |" in card.text
    assert "| `learning_rate` |" in card.text and "\n\n\n" not in card.text

    about = {"name": "meta-llama/Llama-3.2-1B", "on_the_hub": True, "license": "llama3.2"}
    change(folder, lambda found: found["model"].update(about))
    write(folder, {"privleak": {"agg_value": -12.5}}, "evaluation.json")
    (folder / "model" / "adapter_config.json").write_text("{}", encoding="utf-8")
    card = ModelCard.load(write_card(folder))
    assert (card.data.base_model, card.data.license) == ("meta-llama/Llama-3.2-1B", "llama3.2")
    assert card.data.library_name == "peft"
    assert "| PrivLeak | near 0 | \N{MINUS SIGN}12.5 |" in card.text


# --- charts and numbers ---
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


def test_gaps_break_the_line_and_one_step_is_a_dot() -> None:
    path = line_chart([1, 2, 3, 4, 5], [1.0, 2.0, math.nan, 3.0, 4.0])["path"]
    assert path.count("M") == 2 and path.count("L") == 2
    chart = line_chart([1], [0.5])
    assert len(chart["dots"]) == 1 and [step for _, _, step in chart["ends"]] == [1]


@pytest.mark.parametrize(
    "values",
    [
        *([0.0], [3.0, 3.0], [-2.0, 5.0], [1e-9, 1.0], [0.98, 1.02], [-7.0], [1e-300, 1e300], []),
        *([0.3, math.nextafter(0.3, 1)], [-0.7, math.nextafter(-0.7, 0)], [0.0, 5e-324], [1.0, 1 + 1e-8]),
    ],
)
def test_scales_hold_every_value(values: list[float]) -> None:
    scale = plots.fit(values)
    assert scale.low < scale.high and 2 <= len(set(scale.ticks)) == len(scale.ticks) <= 7
    for value in values:
        assert plots.TOP - 1e-6 <= scale.height(value) <= plots.HEIGHT - plots.BOTTOM + 1e-6


def test_numbers_are_written_for_people() -> None:
    values = (0.0, 0.99261, 1200.0, 5e-5, 1e-9, -2.5e7, None, math.nan, math.inf)
    texts = ["0", "0.993", "1200", "5 × 10⁻⁵", "10⁻⁹", "\N{MINUS SIGN}2.5 × 10⁷", "–", "–", "–"]
    assert [number(value) for value in values] == texts
    told = [words.probability(p) for p in (0.99999, 0.88, 1.2e-7)]  # which never claims certainty
    assert told == ["> 0.999", "0.880", "1.2 × 10⁻⁷"]
    assert [words.percent(share) for share in (1.0, 0.99999, 0.5, 0.0)] == ["100 %", "99.9 %", "50 %", "0 %"]
    times = [words.duration(seconds) for seconds in (1.94, 76.2, 612.0, 7500.0)]
    assert times == ["1.9 s", "76 s", "10 min", "2 h 5 min"]


def test_the_histogram_counts_every_secret() -> None:
    values = [1.0, 0.1, 0.05, 1e-3, 5e-5, 1e-6, 1e-12, 0.0]
    scores = [{when: {"probability": value} for when in ("before", "after")} for value in values]
    assert [row["count"]["after"] for row in view.histogram(scores)] == [2, 1, 1, 0, 2, 2]
