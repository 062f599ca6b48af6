"""The pages in a headless Chromium: no complaint, no request, sorting and themes by keyboard, no overflow."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from report.browser import Browser, missing, window

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing() or "a browser is there")

ENTER = "\ue007"
COLUMN = """
const table = document.querySelectorAll("table.sortable")[arguments[0]];
return [...table.tBodies[0].rows].map((row) => row.cells[arguments[1]].textContent);
"""
SORTING = """
const table = document.querySelectorAll("table.sortable")[arguments[0]];
return [...table.tHead.rows[0].cells].map((head) => head.ariaSort);
"""
PAPER = "return getComputedStyle(document.body).backgroundColor"
ACROSS = "return [document.documentElement.scrollWidth, window.innerWidth]"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with window() as one:
        yield one


@pytest.fixture(scope="module")
def phone() -> Iterator[Browser]:
    with window(width=390, height=844) as one:
        yield one


@pytest.mark.parametrize("which", ["study_page", "run_page"])
@pytest.mark.parametrize("screen", ["browser", "phone"])
def test_a_page_loads_quietly_and_fits(request, which: str, screen: str) -> None:
    file: Path = request.getfixturevalue(which)
    one: Browser = request.getfixturevalue(screen)
    one.requests()
    one.complaints()
    one.open(file)
    assert one.complaints() == []
    asked = [address for address in one.requests() if not address.startswith("data:")]
    assert asked == [file.resolve().as_uri()]
    content, screen_width = one.run(ACROSS)
    assert content <= screen_width, "the page itself never scrolls sideways"
    assert one.run("return [...document.images].every((i) => i.complete && i.naturalWidth > 0)")
    assert one.run("return document.querySelectorAll('svg').length") > 3


def test_a_table_sorts_by_keyboard(browser: Browser, study_page: Path) -> None:
    browser.open(study_page)
    assert browser.run("return document.querySelectorAll('table.sortable').length") == 4
    before = browser.run(COLUMN, 1, 1)
    assert len(before) == 7
    browser.run("document.querySelectorAll('table.sortable')[1].id = 'task'")
    head = "#task th:nth-child({}) button"
    for column, key in (
        (5, lambda text: float(text.replace(",", ""))),
        (1, lambda text: float(text.split()[0])),
    ):
        browser.press(head.format(column + 1), ENTER)
        rising = browser.run(COLUMN, 1, column)
        assert rising == sorted(rising, key=key)
        assert browser.run(SORTING, 1)[column] == "ascending"
        browser.press(head.format(column + 1), ENTER)
        assert browser.run(COLUMN, 1, column) == sorted(rising, key=key, reverse=True) != rising
        assert browser.run(SORTING, 1)[column] == "descending"
        assert browser.run(SORTING, 1).count("none") == 8
    browser.press(head.format(1), ENTER)
    names = browser.run(COLUMN, 1, 0)
    assert names == sorted(names, key=str.casefold)
    assert browser.complaints() == []


def test_the_theme_goes_round(browser: Browser, study_page: Path) -> None:
    browser.open(study_page)
    auto = browser.run(PAPER)
    seen = {}
    for name in ("light", "dark", "auto"):
        browser.press("#theme", ENTER)
        assert browser.run("return document.getElementById('theme').textContent") == f"Theme: {name}"
        seen[name] = browser.run(PAPER)
    assert seen["auto"] == auto
    assert seen["light"] == "rgb(253, 253, 251)"
    assert seen["dark"] == "rgb(23, 24, 26)"
    ink = browser.run("return getComputedStyle(document.querySelector('svg .axis')).fill")
    browser.press("#theme", ENTER)
    browser.press("#theme", ENTER)
    assert browser.run("return getComputedStyle(document.querySelector('svg .axis')).fill") != ink, (
        "figures follow"
    )


def test_a_missing_number_stays_at_the_end(browser: Browser, tmp_path: Path) -> None:
    from kindiff.report.page import Cell, page, sortable

    values = [None, 3.0, -1.0, None, 20.0]
    rows = [[f"row {i}", Cell(text=f"{v}", order=v)] for i, v in enumerate(values)]
    (tmp_path / "page.html").write_text(page("t", [sortable(["name", "value"], rows)]))
    browser.open(tmp_path / "page.html")
    browser.press("th:nth-child(2) button", ENTER)
    assert browser.run(COLUMN, 0, 1) == ["-1.0", "3.0", "20.0", "None", "None"]
    browser.press("th:nth-child(2) button", ENTER)
    assert browser.run(COLUMN, 0, 1) == ["20.0", "3.0", "-1.0", "None", "None"]
