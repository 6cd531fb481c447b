"""The page of results in a real browser: headless Chromium, where it and its driver are; the tests install nothing."""

from __future__ import annotations

import importlib.util
import re
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
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(DRIVER)))
    driver.set_page_load_timeout(120)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    """A page of two files."""
    folder = tmp_path_factory.mktemp("pages")
    paths = [sample(folder / "a.json"), sample(folder / "b.json", H100, faster=0.8)]
    (folder / "page.html").write_text(build_page(paths, [read_result(path) for path in paths]))
    return folder / "page.html"


@pytest.fixture
def page(browser, path) -> Any:
    """The page, freshly loaded, at the size of a desk."""
    resize(browser, 1280)
    browser.get(path.as_uri())
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


def test_columns_sort_as_numbers_and_turn_over(page):
    box = table_of(page, "attention in bf16")
    head = click(box, "time,")
    assert head.get_attribute("aria-sort") == "ascending"
    rising = [float(text.split()[0]) for text in column(box, "time,") if text]
    assert rising == sorted(rising)
    assert rising[0] < 3 < 40 < rising[-1]  # 9.9 would come after 47.5 by letters
    assert column(box, "time,")[-4:] == [""] * 4  # what has no time stays at the end
    assert click(box, "time,").get_attribute("aria-sort") == "descending"
    falling = [float(text.split()[0]) for text in column(box, "time,") if text]
    assert falling == rising[::-1]
    assert column(box, "time,")[-4:] == [""] * 4
    other = click(box, "provider")
    assert (head.get_attribute("aria-sort"), other.get_attribute("aria-sort")) == ("none", "ascending")
    assert column(box, "provider") == sorted(column(box, "provider"))


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


@pytest.mark.parametrize("width", [1280, 400])
def test_nothing_is_wider_than_the_screen_and_every_chart_has_a_size(page, width):
    resize(page, width)
    root = "document.documentElement"
    assert page.execute_script(f"return {root}.scrollWidth <= {root}.clientWidth")
    sizes = page.execute_script(
        "return [...document.querySelectorAll('svg.chart')].map((svg) => {"
        " const box = svg.getBoundingClientRect(); return [box.width, box.height, svg.getBBox().width]; })"
    )
    assert len(sizes) >= 9
    assert all(w >= 300 and h >= 40 and drawn > 100 for w, h, drawn in sizes)
    # The answer is on the first screen.
    answer = page.execute_script("return document.querySelector('.answer .tile').getBoundingClientRect().bottom")
    assert answer < 600


def test_colours_follow_the_mode_and_guesses_are_in_italics(page):
    """Text is light on a dark page in dark mode, and the other way round; charts have other colours too."""
    found = {}
    for mode in ("light", "dark"):
        media = {"features": [{"name": "prefers-color-scheme", "value": mode}]}
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        body, tick = (page.find_element("css selector", selector) for selector in ("body", "svg .tick"))
        colours = [body.value_of_css_property(name) for name in ("color", "background-color")]
        found[mode] = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in colours]
        found[mode].append(tick.value_of_css_property("fill"))
    assert found["light"][0] < 300 < 450 < found["light"][1]
    assert found["dark"][1] < 300 < 450 < found["dark"][0]
    assert found["light"][2] != found["dark"][2]
    figure = page.find_element("css selector", "main tr.predicted .figure-value")
    assert figure.value_of_css_property("font-style") == "italic"
