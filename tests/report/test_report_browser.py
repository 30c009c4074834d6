"""The report in a real Chromium: it opens at once and offline, and everybody can read it."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.audits import ATTACKS, write_audit
from helpers.report_runs import FORGET, Run, copy_of, read, write

from palu import write_report

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed (pip install selenium)")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None, reason="no chromium here (apt-get install chromium chromium-driver)"
)

AXE = "axe-core@4.14.1"
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"),
)
WIDTHS = (400, 1600)
SCHEMES = ("light", "dark")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def enlarged(run: Run, folder: Path, count: int) -> Path:
    """A run's own examples, many times over: 2000 steps, an evaluation, an audit, a secret left, two requests."""
    copy_of(run, folder)
    write_audit(run, folder)
    record = read(folder)
    for name, rows in ((name, record[name]) for name in ("secrets", "examples", "retained")):
        record[name] = [rows[i % len(rows)] | {"row": i} for i in range(count)]
    for example in record["examples"]:  # as long as TOFU's answers
        example["tokens"] = example["tokens"] + [[f" word{i}", "ordinary"] for i in range(60)]
    record["secrets"][1]["after"] = {"probability": 0.3, "recalled": True}
    write(folder, record, "record.json")
    ledger = read(folder, "ledger.json")
    ledger["requests"].append(ledger["requests"][0] | {"number": 2, "run": "a-second-request"})
    write(folder, ledger, "ledger.json")
    history = folder / "private" / "history.jsonl"
    steps = [json.loads(line) for line in history.read_text(encoding="utf-8").splitlines()]
    many = [json.dumps(steps[i % len(steps)] | {"step": i + 1}) for i in range(2000)]
    history.write_text("\n".join(many), encoding="utf-8")
    quality = {"agg_value": None, "reason": "no retain_results"}
    write(folder, {"model_utility": {"agg_value": 0.33}, "forget_quality": quality}, "evaluation.json")
    return write_report(folder)


@pytest.fixture(scope="module")
def report(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return enlarged(run, tmp_path_factory.mktemp("many") / "run", 400)


@pytest.fixture(scope="module")
def small_report(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With every part that the large one has: axe takes minutes for that."""
    return enlarged(run, tmp_path_factory.mktemp("few") / "run", 16)


@pytest.fixture(scope="module")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """axe-core's source, from npm."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("no npm here, which fetches axe-core")
    folder = tmp_path_factory.mktemp("axe")
    done = subprocess.run(
        [npm, "install", "--prefix", str(folder), "--no-audit", "--no-fund", "--ignore-scripts", AXE],
        capture_output=True,
        text=True,
        timeout=120,
    )
    if done.returncode:
        pytest.skip(f"npm could not fetch {AXE}: {done.stderr.strip()[-200:]}")
    return (folder / "node_modules/axe-core/axe.min.js").read_text(encoding="utf-8")


@pytest.fixture
def visit(browser: Any) -> Callable[..., None]:
    def visit(path: Path, *, width: int = 1280, scheme: str = "light") -> None:
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        for kind in ("browser", "performance"):
            browser.get_log(kind)  # drop what earlier pages left
        browser.get(path.as_uri())

    return visit


OPEN_ALL = "document.querySelectorAll('details').forEach(one => { one.open = true })"


def test_it_opens_at_once_without_a_request_or_an_error_and_everything_is_there(
    browser: Any, report: Path, visit: Callable[..., None]
) -> None:
    assert report.stat().st_size < 3_000_000
    visit(report)
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    # chrome: and chrome-untrusted: are the browser's own, of the tab that it began with.
    assert [url for url in asked if not url.startswith(("data:", "chrome:", "chrome-untrusted:"))] == [report.as_uri()]
    assert browser.get_log("browser") == []

    def rows_of(section: str) -> list[int]:
        tables = f"[...document.querySelectorAll('{section} table')]"
        return browser.execute_script(f"return {tables}.map(one => one.tBodies[0].rows.length)")

    def count_of(selector: str) -> int:
        return browser.execute_script(f"return document.querySelectorAll('{selector}').length")

    assert browser.execute_script("return document.querySelector('h1').textContent").startswith("399 of 400 secrets")
    lines = browser.execute_script(
        "return [...document.querySelectorAll('#training svg')].map(one => one.querySelector('.line').getTotalLength())"
    )
    assert len(lines) >= 5 and all(length > 100 for length in lines)  # drawn, and as wide as the chart
    assert sum(rows_of("#secrets")) == 6 + 400  # the histogram, then the secrets
    assert rows_of("#audit") == [len(ATTACKS), 5]
    assert rows_of("#requests") == [2]
    assert (count_of("#roles .example"), count_of("#answers .pair")) == (400, 8 + 6)
    assert "FAIL" not in browser.execute_script("return document.body.innerText")


@pytest.mark.parametrize("width", WIDTHS)
def test_it_fits_every_width_and_marks_lie_where_their_shares_are(
    browser: Any, report: Path, visit: Callable[..., None], width: int
) -> None:
    visit(report, width=width)
    browser.execute_script(OPEN_ALL)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    places = browser.execute_script(
        """return [...document.querySelectorAll('#audit .track')].map(track => {
            const line = track.getBoundingClientRect();
            return ['is', 'was', 'post'].map(name => {
                const mark = track.querySelector('.' + name).getBoundingClientRect();
                return (mark.left + mark.width / 2 - line.left) / line.width;
            });
        })"""
    )
    assert len(places) == len(ATTACKS) - 1  # one was skipped
    assert places[0] == pytest.approx([2 / 9, 1, 1 / 9], abs=0.01)
    assert places[-1] == pytest.approx([5 / 9, 1, 0], abs=0.01)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_axe_finds_nothing_serious(
    browser: Any, small_report: Path, axe: str, visit: Callable[..., None], width: int, scheme: str
) -> None:
    visit(small_report, width=width, scheme=scheme)
    browser.execute_script(OPEN_ALL)
    browser.execute_script(axe)
    found = browser.execute_async_script("axe.run(document).then(arguments[arguments.length - 1])")
    assert [one for one in found["violations"] if one["impact"] in ("serious", "critical")] == []
    assert len(found["passes"]) > 20


def test_the_keyboard_reaches_everything(browser: Any, report: Path, visit: Callable[..., None]) -> None:
    from selenium.webdriver.common.keys import Keys

    visit(report)
    focus = browser.switch_to.active_element
    focus.send_keys(Keys.TAB)
    assert browser.switch_to.active_element.get_attribute("class") == "skip"
    browser.switch_to.active_element.send_keys(Keys.ENTER)
    assert browser.execute_script("return document.activeElement.id") == "main"
    browser.execute_script("document.querySelector('#roles summary').focus()")
    browser.switch_to.active_element.send_keys(Keys.ENTER)
    assert browser.execute_script("return document.querySelector('#roles details').open")


def test_hostile_text_runs_nothing(browser: Any, run: Run, visit: Callable[..., None]) -> None:
    visit(write_report(run.folder))
    text = browser.execute_script("return document.body.textContent")
    assert all(row["answer"] in text for row in FORGET[:8])
    assert browser.execute_script("return document.scripts.length + document.images.length") == 0
    assert browser.get_log("browser") == []


def test_print_is_light_and_unfolded(browser: Any, report: Path, visit: Callable[..., None]) -> None:
    visit(report, scheme="dark")
    style = "return getComputedStyle(document.body).backgroundColor"
    dark = browser.execute_script(style)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    assert dark != browser.execute_script(style) == "rgb(255, 255, 255)"
    shown = "return document.querySelector('#roles details .example').getBoundingClientRect().height"
    assert browser.execute_script(shown) > 0
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
