"""The page of results in a real browser: headless Chromium, where it and its driver are; the tests install nothing."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.records.read import read_result
from bench.report.page import build_page
from tests.support.result_samples import H100, sample

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
MISSING = [name for name, found in (("chromium", BROWSER), ("chromedriver", DRIVER)) if found is None]
MISSING += [] if importlib.util.find_spec("selenium") else ["selenium"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
]


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Any]:
    """One browser for all tests, with a profile of its own."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(BROWSER)
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(DRIVER)))
    driver.set_page_load_timeout(120)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    """A page of one file, and one of two."""
    folder = tmp_path_factory.mktemp("pages")
    paths = [sample(folder / "a.json"), sample(folder / "b.json", H100, faster=0.8)]
    made = {}
    for name, given in (("one", paths[:1]), ("two", paths)):
        made[name] = folder / f"{name}.html"
        made[name].write_text(build_page(given, [read_result(path) for path in given]))
    return made


@pytest.fixture
def page(browser, pages) -> Any:
    """The page of one file, freshly loaded, at the size of a desk."""
    resize(browser, 1280)
    browser.get(pages["one"].as_uri())
    return browser


def resize(browser: Any, width: int) -> None:
    """Gives the viewport this width; windows have a least width, and viewports have none."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def table_of(browser: Any, name: str) -> Any:
    """Returns the box of a table by what it is called for who cannot see it."""
    return browser.find_element("xpath", f"//*[@role='region'][@aria-label='{name}']/..")


def column(box: Any, head: str) -> list[str]:
    """Returns the texts of a column, from top to bottom, of rows that are shown."""
    heads = [element.text.split(" ")[0] for element in box.find_elements("css selector", "th")]
    at = heads.index(head) + 1
    rows = box.find_elements("css selector", f"tbody tr td:nth-child({at})")
    return [cell.text for cell in rows if cell.is_displayed()]


def click(box: Any, head: str) -> Any:
    """Presses a column's button; returns its head."""
    (found,) = [e for e in box.find_elements("css selector", "th") if e.text.split(" ")[0] == head]
    box.parent.execute_script("arguments[0].scrollIntoView({block: 'center', inline: 'center'})", found)
    found.find_element("css selector", "button").click()
    return found


def test_the_page_loads_nothing_and_logs_nothing(browser, pages):
    for name in pages:
        browser.get_log("performance")
        # Without a network the page is the same.
        browser.execute_cdp_cmd("Network.enable", {})
        offline = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
        browser.execute_cdp_cmd("Network.emulateNetworkConditions", offline)
        browser.get(pages[name].as_uri())
        assert browser.title == "swifti2v: benchmark results"
        messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
        asked = {m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"}
        assert asked <= {pages[name].as_uri(), "data:,"}
        assert pages[name].as_uri() in asked
        assert browser.get_log("browser") == []
        assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0


def test_the_policy_of_the_page_forbids_requests(page):
    """The browser refuses a request that the page might make, although it makes none."""
    script = """const done = arguments[0];
        document.addEventListener('securitypolicyviolation', (event) => done(event.effectiveDirective));
        fetch('data:text/plain,x').catch(() => {});"""
    assert page.execute_async_script(script) == "connect-src"
    assert len(page.get_log("browser")) >= 1


def test_columns_sort_as_numbers_and_turn_over(page):
    box = table_of(page, "attention in bf16")
    before = column(box, "time,")
    assert before[0].startswith("47.50")
    head = click(box, "time,")
    assert head.get_attribute("aria-sort") == "ascending"
    rising = [float(text.split()[0]) for text in column(box, "time,") if text]
    assert rising == sorted(rising)
    assert rising[0] < 3 < 40 < rising[-1]  # 9.9 would come after 47.5 by letters
    assert column(box, "time,")[-4:] == [""] * 4  # what has no time stays at the end
    head = click(box, "time,")
    assert head.get_attribute("aria-sort") == "descending"
    falling = [float(text.split()[0]) for text in column(box, "time,") if text]
    assert falling == rising[::-1]
    assert column(box, "time,")[-4:] == [""] * 4
    other = click(box, "provider")
    assert (head.get_attribute("aria-sort"), other.get_attribute("aria-sort")) == ("none", "ascending")
    names = column(box, "provider")
    assert names == sorted(names)


def test_the_filter_hides_rows_and_says_how_many_are_left(page):
    box = table_of(page, "attention in bf16")
    search, count = (box.find_element("css selector", name) for name in ("input", "output"))
    assert count.text == "12 rows"
    search.send_keys("SDPA 3 sources")
    assert sorted(column(box, "provider")) == ["sdpa-cudnn", "sdpa-flash"]
    assert count.text == "2 of 12 rows"
    click(box, "TFLOP/s")
    assert column(box, "provider") == ["sdpa-flash", "sdpa-cudnn"]
    search.send_keys(" none")
    assert column(box, "provider") == []
    search.clear()
    search.send_keys(" ")
    assert len(column(box, "provider")) == 12
    assert count.text == "12 rows"


def test_what_is_not_measured_is_visibly_marked(page):
    for basis in ("extrapolated", "predicted", "reported", "compiled"):
        rows = page.find_elements("css selector", f"main tr.{basis}")
        assert rows
        for row in rows:
            badge = row.find_element("css selector", f".badge.{basis}")
            assert badge.is_displayed()
            assert badge.text == basis
            for figure in row.find_elements("css selector", ".figure-value"):
                assert figure.value_of_css_property("font-style") == "italic"
    measured = page.find_element("css selector", "tr.ours:not(.unmeasured) .figure-value")
    assert measured.value_of_css_property("font-style") == "normal"


@pytest.mark.parametrize("name", ["one", "two"])
@pytest.mark.parametrize("width", [1280, 400])
def test_nothing_is_wider_than_the_screen_and_every_chart_has_a_size(browser, pages, name, width):
    resize(browser, width)
    browser.get(pages[name].as_uri())
    root = "document.documentElement"
    assert browser.execute_script(f"return {root}.scrollWidth <= {root}.clientWidth")
    sizes = browser.execute_script(
        "return [...document.querySelectorAll('svg.chart')].map((svg) => {"
        " const box = svg.getBoundingClientRect(); return [box.width, box.height, svg.getBBox().width]; })"
    )
    assert len(sizes) >= 9
    assert all(w >= 300 and h >= 40 and drawn > 100 for w, h, drawn in sizes)
    # The answer is on the first screen.
    answer = browser.execute_script("return document.querySelector('.answer .tile').getBoundingClientRect().bottom")
    assert answer < 600
    # What is wider than the screen scrolls in a box of its own, which the keyboard reaches.
    boxes = browser.execute_script(
        "return [...document.querySelectorAll('.scroll')]"
        ".map((box) => [box.tabIndex, box.getBoundingClientRect().right])"
    )
    assert all(tab == 0 and right <= width for tab, right in boxes)


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_text_is_readable_in_light_and_in_dark(page, mode):
    """Contrast of at least 4.5 to 1 between the page and each kind of coloured text on it."""
    media = {"features": [{"name": "prefers-color-scheme", "value": mode}]}
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    background = luminance(page, "body", "background-color")
    assert (background < 0.1) == (mode == "dark")
    kinds = [f".badge.{basis}" for basis in ("extrapolated", "predicted", "counted", "compiled", "reported", "good")]
    for selector in ["body", ".muted", "nav a", ".note", "td.notes .warn", "td.notes .bad", ".tile.bad b", *kinds]:
        assert contrast(luminance(page, selector, "color"), background) >= 4.5, selector
    for selector in ("svg .ceiling-label", "svg .failed", "svg .tick", "svg text:not([class])"):
        assert contrast(luminance(page, selector, "fill"), background) >= 4.5, selector
    for selector in (".bar.ours", ".bar.other", ".line"):
        drawn = luminance(page, selector, "stroke" if selector == ".line" else "fill")
        assert contrast(drawn, background) >= 2, selector
    bad = [luminance(page, ".badge.bad", name) for name in ("color", "background-color")]
    assert contrast(*bad) >= 4.5


def luminance(browser: Any, selector: str, name: str) -> float:
    """Returns the relative luminance of a colour as the page has it, by WCAG."""
    colour = browser.find_element("css selector", selector).value_of_css_property(name)
    channels = [float(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(a: float, b: float) -> float:
    """Returns the contrast of two luminances, by WCAG."""
    return (max(a, b) + 0.05) / (min(a, b) + 0.05)
