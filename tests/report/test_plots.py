"""Charts and numbers of the report."""

import math

import pytest

from palu.report import plots, view, words
from palu.report.plots import downsample, line_chart, number


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
