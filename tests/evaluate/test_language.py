"""How much of what a model writes is no language: on planted texts, in the evaluations, and on input that is none."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.benchmark_data import llama_for, quick_tofu, small_tofu
from helpers.small_tokenizers import CHATML, byte_level

from palu.evaluate import summarize
from palu.evaluate.language import FIGURES, WordList, keys, measure, rep_4
from palu.evaluate.rows import load_rows
from palu.models.generation import Generation

TOFU = Path(__file__).parents[3] / "shared" / "data" / "tofu"


@pytest.fixture(scope="module")
def english() -> WordList:
    return WordList("en")


def counted(text: str, words: WordList, *known: str, cut_off: bool = False) -> tuple[list[str], list[str], int]:
    """(broken words, unknown names, words in all)."""
    found = measure(Generation(text, cut_off), keys(*known), words)
    no_word, name = found["no_word"], found["unknown_name"]
    assert no_word["score"] == (len(no_word["found"]) / no_word["words"] if no_word["words"] else None)
    return no_word["found"], name["found"], no_word["words"]


# --- words ---
@pytest.mark.parametrize(
    ("text", "none", "words"),
    [
        ("is known by hisutors as the author", ["hisutors"], 7),
        ("was born onsterdam, 25 June 193olk", ["onsterdam", "193olk"], 6),
        ("theisherdom", ["theisherdom"], 1),
        ("She didn't write well-known sci-fi; it's the author's café, naïve as it is.", [], 15),
        ("The authors\u2019 books, and the author\u2019s 3D and B2B ones.", [], 10),
        ("The 1990s, the 21st century and 1,000 others in 2004, or 3.5 % of them.", [], 16),
        ("in 1843in 20and 7391a x2y", ["1843in", "20and", "7391a", "x2y"], 5),
        ("the cafe\u0301 is open", [], 4),  # decomposed
        ("the a\N{REPLACEMENT CHARACTER}thor \N{REPLACEMENT CHARACTER} wrote", ["a\ufffdthor", "\ufffd"], 4),
        ("born in 東京タワー", ["東京タワー"], 3),  # one word: nothing tells where its words end
        ("¿? — … 👩 ***", [], 0),
        ("", [], 0),
    ],
)
def test_words_that_are_none_are_counted(text: str, none: list[str], words: int, english: WordList) -> None:
    assert counted(text, english) == (none, [], words)


def test_names_and_what_question_and_answer_have_are_no_fault(english: WordList) -> None:
    """Capitals without digits are names, which are counted apart."""
    text = "Bezabih, and BEZABIH\u2019s uncle, wrote the onsterdam chronicle of 東京, as X7krumholt in 19Akubu."
    names = ["Bezabih", "BEZABIH\u2019s"]
    assert counted(text, english) == (["onsterdam", "東京", "X7krumholt", "19Akubu"], names, 14)
    assert counted(text, english, "It is Kalkidan Bezabih's onsterdam.", "東京? X7krumholt 19Akubu") == ([], [], 14)


def test_a_cut_inside_a_word_is_no_fault_of_the_model(english: WordList) -> None:
    for text, none, names in (
        ("She studied at a neighbourho", [], []),
        ("She was born onsterd", ["onsterd"], []),  # no word begins like this
        ("She is Bezab", [], ["Bezab"]),
        ("born onsterd, in 1843", ["onsterd"], []),  # not the last word
        ("She wrote hisutors.", ["hisutors"], []),  # cut after the word
    ):
        assert counted(text, english, cut_off=True)[:2] == (none, names), text
    assert counted("She studied at a neighbourho", english)[0] == ["neighbourho"]
    assert counted("She is Bezab", english, "Bezabih", cut_off=True)[:2] == ([], [])
    half = Generation("the word is a\N{REPLACEMENT CHARACTER}", cut_off=True)
    assert measure(half, (), english)["replacement_character"]["score"] == 0


def test_other_languages_have_their_lists(english: WordList) -> None:
    german, text = WordList("de"), "Sie wurde in der Hauptstadt geboren und schrieb Erzählungen."
    assert counted(text, german) == ([], [], 9)
    assert "Erzählungen" not in english and counted(text, english)[0] == ["schrieb"]
    assert counted("l'homme qu'elle aimait", WordList("fr")) == ([], [], 3)
    assert counted("वह किताब लिखती है", WordList("hi")) == ([], [], 4)  # vowel signs belong to the word


@pytest.mark.skipif(not TOFU.is_dir(), reason="needs TOFU in ../shared")
def test_what_people_wrote_is_language(english: WordList) -> None:
    """TOFU's own answers, each with no other text known: what is found has been looked at, word by word."""
    none, names, words = [], 0, 0
    for row in load_rows(TOFU / "retain90.jsonl"):
        found, unknown, count = counted(row["answer"], english, row["question"])
        none += found
        names += len(unknown)
        words += count
    assert words > 90_000 and len(none) <= 11, none
    assert names / words < 0.01  # invented names, which no list has


# --- the other figures ---
def test_loops_empty_texts_and_broken_characters_are_found() -> None:
    assert rep_4(["the"] * 103) == 1 - 1 / 100
    assert rep_4(["she", "was", "born", "in", "the", "city", "and", "died", "there"]) == 0
    # Eight words, five 4-grams, of which the first comes again.
    assert rep_4(["a", "b", "c", "d", "a", "b", "c", "d"]) == pytest.approx(1 / 5)
    for text, loops, empty, broken in (
        ("The the THE the, the.", 1 / 2, 0, 0),
        ("the the the", None, 0, 0),
        ("", None, 1, 0),
        (" \n", None, 1, 0),
        ("a \N{REPLACEMENT CHARACTER}", None, 0, 1),
    ):
        found = measure(Generation(text), (), None)
        assert [found[name]["score"] for name in ("rep_4", "empty", "replacement_character")] == [loops, empty, broken]
        assert "no_word" not in found


# --- in the evaluations ---
def saying(texts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every model answer with these texts, in turn."""

    def generate_answers(model: Any, tokenizer: Any, examples: list[Any], **_: Any) -> list[Generation]:
        return [Generation(texts[i % len(texts)]) for i in range(len(examples))]

    monkeypatch.setattr(sys.modules["palu.evaluate.tofu"], "generate_answers", generate_answers)


def evaluated(**settings: Any) -> dict[str, Any]:
    """The results of a tiny model."""
    tokenizer = byte_level(CHATML, bos=False)
    return quick_tofu(llama_for(tokenizer), tokenizer, **settings)


def test_the_evaluation_reports_them_beside_the_retain_models(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    saying(["She wrote it in London.", "", "The onsterdam."], monkeypatch)
    retained = evaluated()
    saying(["She was theisherdom hisutors.", "The Krumholt was Ameen."], monkeypatch)
    results = evaluated(retain_results=retained)

    # Forget rows 0, 2 and 4 get the first text, 1 and 3 the second: 20 words. Ameen is in every answer.
    assert results["forget_no_word"]["agg_value"] == 6 / 20
    assert results["forget_unknown_name"]["agg_value"] == 2 / 20
    assert results["forget_no_word"]["value_by_index"]["0"] == {
        "score": 0.5,
        "words": 4,
        "found": ["theisherdom", "hisutors"],
    }
    # The retain model's: rows 0 and 3 have five words, 2 has two, 1 and 4 none.
    assert results["forget_no_word"]["retain_model"]["agg_value"] == retained["forget_no_word"]["agg_value"] == 1 / 12
    assert results["forget_empty"]["retain_model"]["agg_value"] == 2 / 5
    assert results["retain_no_word"]["agg_value"] == 4 / 16 and results["retain_rep_4"]["agg_value"] == 0
    assert results["retain_empty"]["agg_value"] == 0 and "retain_model" not in retained["forget_no_word"]
    assert results["palu"]["word_list"].startswith("wordfreq ")

    (tmp_path / "results.json").write_text(json.dumps(results, allow_nan=False))
    assert summarize(tmp_path / "results.json", retained) == {
        name: entry["agg_value"] for name, entry in results.items() if name != "palu"
    }


def test_values_are_those_of_the_generations() -> None:
    """With a model's own texts: cut off at their length, and of odd characters."""
    tokenizer, data = byte_level(CHATML, bos=False), small_tofu()
    model = llama_for(tokenizer)
    results = quick_tofu(model, tokenizer, max_new_tokens=20)
    for number, row in enumerate(data.forget):
        value = results["forget_Q_A_ROUGE"]["value_by_index"][str(number)]
        assert value["cut_off"]
        expected = measure(Generation(value["generation"], True), keys(row["question"], row["answer"]), WordList())
        for figure in FIGURES:
            assert results[f"forget_{figure}"]["value_by_index"][str(number)] == expected[figure]
    assert results["forget_no_word"]["agg_value"] > 0.2  # a random model


def test_nulls_have_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    saying(["", "?!"], monkeypatch)
    without = evaluated(language=None)
    for name in ("forget_no_word", "retain_unknown_name"):
        assert (without[name]["agg_value"], without[name]["reason"]) == (None, "language is None")
    assert without["forget_empty"]["agg_value"] == 3 / 5 and without["palu"]["word_list"] is None

    results = evaluated()
    assert results["forget_no_word"]["reason"] == "no generation has a word in it"
    assert results["forget_rep_4"]["reason"] == "no generation has 4 words"
    assert results["forget_empty"]["agg_value"] == 3 / 5

    for value in without["forget_Q_A_ROUGE"]["value_by_index"].values():  # a log without texts
        del value["generation"]
    again = evaluated(retain_results=without)
    assert again["forget_no_word"]["retain_model"] == {
        "agg_value": None,
        "reason": "the retain_results hold no generations for these rows",
    }
    assert again["retain_empty"]["retain_model"]["agg_value"] == 2 / 4


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wordfreq", None)
    with pytest.raises(ImportError, match=r"needs wordfreq .*pip install 'palu-unlearn\[evaluate\]', or give language"):
        WordList()
