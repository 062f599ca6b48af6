"""Charts: places, fronts, ticks and what is left out."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from kindiff.report.charts import Axis, Scale, Series, chart, pareto_front, ticks
from kindiff.report.heat import heat
from kindiff.report.svg import short

X, Y = Axis(name="steps"), Axis(name="distance")


def marks(drawn: str) -> list[str]:
    """The tooltips of the points, in order of drawing."""
    return re.findall(r'<path class="point"[^>]*><title>(.*?)</title>', drawn)


def heights(drawn: str) -> dict[str, float]:
    """The height of each series' label, by name."""
    root = ElementTree.fromstring(drawn)
    return {e.text: float(e.get("y")) for e in root.iter("text") if e.get("class") != "axis"}


def test_a_scale_maps_its_ends_and_orders() -> None:
    for log in (False, True):
        scale = Scale(1.0, 100.0, 10.0, 210.0, log)
        assert scale(1.0) == pytest.approx(10)
        assert scale(100.0) == pytest.approx(210)
        assert scale(10.0) == pytest.approx(110 if log else 10 + 200 * 9 / 99)


@pytest.mark.parametrize(("low", "high"), [(0.0, 7.3), (3.1, 3.4), (1200, 96000), (1e-5, 2e-5)])
@pytest.mark.parametrize("log", [False, True])
def test_ticks_are_few_and_inside(low: float, high: float, log: bool) -> None:
    scale = Scale(max(low, 1e-6) if log else low, high, 0, 1, log)
    found = ticks(scale)
    assert all(scale.low <= value <= scale.high for value in found)
    assert 1 <= len(found) <= 12
    assert found == sorted(found)


def test_the_front_is_what_no_other_beats_both_ways() -> None:
    assert pareto_front([(3, 1), (1, 5), (2, 6), (2, 3), (4, 1), (5, 0.5)]) == [
        (1, 5),
        (2, 3),
        (3, 1),
        (5, 0.5),
    ]


def test_every_point_has_its_figures() -> None:
    drawn = chart("t", [Series(name="a<b", points=[(1, 2.5)], spreads=[0.25])], x=X, y=Y)
    assert marks(drawn) == ["a&lt;b: distance 2.5 ± 0.25, steps 1"]
    ElementTree.fromstring(drawn)


def test_lower_values_are_drawn_lower() -> None:
    series = [Series(name=n, points=[(1, v), (2, v)]) for n, v in (("low", 1.0), ("high", 9.0))]
    places = heights(chart("t", series, x=X, y=Y))
    assert places["low"] > places["high"]


def test_names_at_the_ends_of_lines_do_not_overlap() -> None:
    series = [Series(name=f"method {i}", points=[(1, 5), (2, 5 + i / 1000)]) for i in range(14)]
    places = sorted(heights(chart("t", series, x=X, y=Y)).values())
    assert len(places) == 14
    assert min(b - a for a, b in pairwise(places)) >= 11.9


def test_what_cannot_be_drawn_is_left_out() -> None:
    series = [
        Series(name="a", points=[(0, 1), (1, math.nan), (2, 3)], spreads=[1, 1, 0.5]),
        Series(name="b", points=[]),
    ]
    drawn = chart("t", series, x=Axis(name="rate", log=True), y=Y)
    assert marks(drawn) == ["a: distance 3 ± 0.5, rate 2"]
    assert "no figures" in chart("t", [Series(name="a", points=[(-1, 1)])], x=Axis(name="r", log=True), y=Y)


def test_a_spread_below_zero_stays_on_a_logarithmic_scale() -> None:
    drawn = chart("t", [Series(name="a", points=[(1, 1)], spreads=[2])], x=X, y=Axis(name="d", log=True))
    assert "nan" not in drawn
    ElementTree.fromstring(drawn)


def test_a_level_far_off_is_named_and_does_not_flatten_the_rest() -> None:
    series = [Series(name=n, points=[(1, v)]) for n, v in (("a", 10.0), ("b", 12.0))]
    near, far = (chart("t", series, x=X, y=Y, rule=(level, "floor")) for level in (8.0, 1.0))
    assert 'class="rule"' in near
    assert 'class="rule"' not in far
    assert "t (floor: not in the picture)" in far
    assert heights(far)["a"] - heights(far)["b"] > 200


def test_one_value_everywhere_is_drawn() -> None:
    for log in (False, True):
        axis = Axis(name="a", log=log)
        assert len(marks(chart("t", [Series(name="a", points=[(5, 5)])], x=axis, y=axis))) == 1


def test_a_heat_map_colours_by_sign_and_size() -> None:
    drawn = heat(
        "t", ["r"], ["p", "q", "s"], [[0.5, -0.25, 9.0]], limit=0.5, show=lambda v: f"{v:.2f}", numbers=True
    )
    assert re.findall(r"srgb, var\(--(\w+)\) (\d+)%", drawn) == [
        ("more", "100"),
        ("less", "50"),
        ("more", "100"),
    ]
    assert "<title>r, q: -0.25</title>" in drawn
    ElementTree.fromstring(drawn)


def test_short_figures() -> None:
    assert [short(v) for v in (0.0005, 0.05, 12, 3500, 961000, 2e6)] == [
        "0.0005",
        "0.05",
        "12",
        "3.5k",
        "961k",
        "2M",
    ]
