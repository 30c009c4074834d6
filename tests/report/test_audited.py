"""The audit in report and model card."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.audits import ATTACKS, write_audit
from helpers.report_runs import Page, Run, change, copy_of, write
from huggingface_hub import ModelCard

from palu import write_card, write_report
from palu.report import audited
from palu.report.reading import RecordError


@pytest.fixture(scope="module")
def audit(run: Run, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return write_audit(run, copy_of(run, tmp_path_factory.mktemp("audited") / "run"))


@pytest.fixture
def shown(folder: Path, audit: dict[str, Any]) -> Callable[..., str]:
    """Writes the report of a run with the audit, edited, and returns the source of the audit's section."""

    def shown(edit: Callable[[dict[str, Any]], object] = lambda audit: None, *, redact: bool = False) -> str:
        write(folder, audit, "audit.json")
        change(folder, edit, "audit.json")
        source = write_report(folder, redact=redact).read_text(encoding="utf-8")
        (found,) = re.findall(r'<section id="audit".*?</section>', source, re.DOTALL)
        return found

    return shown


def test_the_audit_is_a_chart_with_budgets_intervals_and_verdicts(
    run: Run, folder: Path, audit: dict[str, Any], shown: Callable[..., str]
) -> None:
    assert "What an attacker gets out" not in Page(write_report(folder)).text
    source = shown()
    rows = re.findall(r"<tr.*?</tr>", source[: source.index("Secrets that leaked")], re.DOTALL)[1:]
    for row, attack, found in zip(rows, ATTACKS, audit["attacks"], strict=True):
        if attack.lacks:
            assert "skipped: the forget set has no column" in row and "undecided" in row
            assert attack.budget not in row and "track" not in row
            continue
        assert attack.name in row and attack.budget in row
        rho, told = found["rho"], {role: of["told"] for role, of in found["models"].items()}
        assert f"{rho['value']:.2f} ({rho['low']:.2f} to {rho['high']:.2f})" in row
        assert f'class="verdict {found["verdict"]}">{found["verdict"]}<' in row
        for role, mark in (("unlearned", "is"), ("original", "was"), ("retain", "post")):
            assert f"{role} {told[role]:.2f}" in row
            assert f'<i class="{mark}" style="--x:{100 * told[role]:.1f}">' in row
        # Laid between the retain model and the original, it holds the unlearned model's own share.
        ends = re.search('class="way" style="--a:(.*?);--b:(.*?)"', row)
        assert ends and float(ends[1]) - 0.1 <= 100 * told["unlearned"] <= float(ends[2]) + 0.1
    assert "relearn: lora (of 8)" in rows[5] and "utility 0.80, before 0.90" in rows[4]
    page = Page(folder / "private" / "report.html")
    assert page.text.count("Open in the audit: inside: lens.") == 1
    assert "9 secrets are few" in page.text and "retain model, which never saw the secrets" in page.text
    assert "without a retain model" not in page.text
    assert "its 95 % interval ends at 0.1 or below" in page.text
    assert "#audit" in {attributes.get("href") for attributes in page.attributes("a")}

    alone = write_audit(run, folder, retain=False)
    text = shown(lambda found: found.update(alone))
    assert "without a retain model its share is taken as 0" in text and "post" not in text


def test_leaked_secrets_come_with_the_answer_that_tells_them(folder: Path, shown: Callable[..., str]) -> None:
    leaked = re.findall(r"<tr>.*?</tr>", shown().split("Secrets that leaked")[1], re.DOTALL)[1:]
    assert len(leaked) == 5
    told = 'The author is <mark>Hina Ameen</mark>, in London.</span><span class="q">ask: greedy; relearn: lora'
    assert told in leaked[0], "the one that four attacks got"
    assert "<mark>HINA AMEEN</mark>" in leaked[0] and "sample: 2 of 2 draws" in leaked[0]
    assert "東京" in leaked[1] and "onset: 1 in the answer (probability 0.607)" in leaked[1]
    assert "<mark>&lt;script&gt;alert(1)&lt;/script&gt;</mark>" in leaked[2]
    assert "ask: greedy, from the retain model, too" in leaked[2]
    assert "inside: lens (layer 2, rank 3)" in leaked[4]
    assert "script" not in {tag for tag, _ in Page(folder / "private" / "report.html").tags}

    def by_parts(audit: dict[str, Any]) -> None:
        values = {"lens": [0, 0, 0.3, 0, 0, 0.6, 0, 0, 0], "onset": [0, 0, 0, 0.02, 0.009, 0, 0, 0, 0]}
        for row in audit["attacks"]:
            if row["attack"] in values:
                row["models"]["unlearned"]["values"] = values[row["attack"]]

    parts = shown(by_parts).split("Secrets that leaked")[1]
    assert parts.count("inside: lens") == 1 and "img src" in parts  # the sixth, by half; not the third
    assert parts.count("onset: 1") == 1 and "東京" in parts  # a probability of 0.02, not 0.009

    def many(audit: dict[str, Any]) -> None:
        audit["secrets"] *= 3
        for found in (found for row in audit["attacks"] for found in row["models"].values()):
            found["values"], found["evidence"] = found["values"] * 3, found["evidence"] * 3

    assert "3 more secrets</summary>" in shown(many)
    none = shown(lambda audit: [row.update(models={}, verdict="held") for row in audit["attacks"]])
    assert "</strong> none. All of these held." in " ".join(none.split())
    assert "None: no attack got one out of the unlearned model." in none


def test_a_secret_is_marked_as_it_is_told() -> None:
    """As a whole word where there is one."""
    assert audited.marked("17, then 7", "7", "yes") == [("17, then ", False), ("7", True)]
    assert audited.marked("in 東京都 😀", "東京", "😀")[1::2] == [("東京", True), ("😀", True)]
    assert audited.marked("xLena", "Lena") == [("x", False), ("Lena", True)]


def test_redaction_leaves_nothing_of_the_audit_that_tells(
    folder: Path, audit: dict[str, Any], shown: Callable[..., str]
) -> None:
    """Neither the record's secrets nor one that only the audit knows, and no answer and no hash."""

    def another(found: dict[str, Any]) -> None:
        found["secrets"][0] |= {"text": "Zanzibar", "question": "Is the city of ZANZIBAR number 0?"}
        found["attacks"][0]["models"]["unlearned"]["evidence"][0] = "It is zanzibar, near the harbour."

    change(folder, lambda found: found["answers"]["retain"][0].update(after="I saw Zanzibar."))
    plain = shown(another)
    assert "harbour" in plain and "Zanzibar" in plain
    assert audit["forget_sha256"] not in (folder / "private" / "report.html").read_text(encoding="utf-8")
    assert "<mark>" not in shown(another, redact=True)
    path = folder / "private" / "report-redacted.html"
    text = Page(path).text + path.read_text(encoding="utf-8")
    secrets = ["Zanzibar", *(secret["text"] for secret in audit["secrets"])]
    assert not any(secret.casefold() in text.casefold() for secret in secrets)
    assert "harbour" not in text and "I saw ███." in text and audit["forget_sha256"] not in text
    assert "Is the city of ███ number 0?" in text and "ask: greedy; sample: 2 of 2 draws" in text


def test_an_audit_of_another_model_is_said_to_be(folder: Path, shown: Callable[..., str]) -> None:
    def texts(edit: Callable[[dict[str, Any]], object]) -> tuple[str, str]:
        shown(edit)
        return Page(folder / "private" / "report.html").text, write_card(folder).read_text(encoding="utf-8")

    page, card = texts(lambda found: found["models"]["unlearned"].update(fingerprint="0" * 64))
    assert audited.OTHER_MODEL in page and audited.OTHER_MODEL in card
    assert "Open in the audit" not in page  # it is not this model's
    for edit in (lambda found: None, lambda found: found["models"]["unlearned"].pop("fingerprint")):
        assert not any(audited.OTHER_MODEL in text for text in texts(edit))


def test_a_row_of_figures_alone_is_shown(folder: Path, shown: Callable[..., str]) -> None:
    row = {"name": "inside: depth", "rho": dict.fromkeys(("value", "low", "high")), "verdict": "undecided"}
    row |= {"reason": None, "models": {"unlearned": {"figures": {"depth": 0.125}}}}
    source = shown(lambda audit: audit["attacks"][-1].update(row)).split("inside: depth")[-1].split("</tr>")[0]
    assert "unlearned depth 0.125" in source and "track" not in source
    assert "depth 0.125 |  |  |  | undecided |" in write_card(folder).read_text(encoding="utf-8")


def test_the_card_has_the_audit_and_nothing_of_the_sets(folder: Path, audit: dict[str, Any]) -> None:
    assert "## Audit" not in ModelCard.load(write_card(folder)).text
    write(folder, audit, "audit.json")
    card = ModelCard.load(write_card(folder))
    assert "| attack | unlearned | original | retain | rho (95 %) | verdict | budget |" in card.text
    assert "| ask: greedy | 0.22 | 1.00 | 0.11 | 0.12 (" in card.text
    assert "| inside: lens | 0.56 | 1.00 | 0.00 | 0.56 (0.22 to 0.89) | open | the budget of lens |" in card.text
    assert "|  |  |  |  | undecided | skipped: the forget set has no column" in card.text
    assert "It was a quick audit" in card.text and "- 9 secrets are few" in card.text and "\n\n\n" not in card.text
    private = [secret[name] for secret in audit["secrets"] for name in ("text", "question")]
    private += [audit["forget_sha256"], *(model["fingerprint"] for model in audit["models"].values())]
    assert not any(text in card.content for text in private)


def test_a_damaged_audit_is_named(folder: Path, shown: Callable[..., str]) -> None:
    with pytest.raises(RecordError, match=r"audit\.json has format None.*; run palu audit again, or delete it"):
        shown(lambda found: found.clear())
    for content in (b'{"format": 1, "secr', b"\xff\xfe"):
        (folder / "private" / "audit.json").write_bytes(content)
        with pytest.raises(RecordError, match=r"audit\.json is damaged"):
            write_card(folder)
