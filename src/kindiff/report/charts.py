"""Points and lines on linear or logarithmic axes. Every mark has its figures as a tooltip."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

from kindiff.report.svg import LETTER, LINE, figure, short, text

WIDTH, HEIGHT = 480.0, 330.0
LEFT, RIGHT, TOP, BOTTOM = 52.0, 14.0, 10.0, 40.0
LABELS = 130.0
"""Room at the right of lines for their names."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """What is drawn in one colour under one name: a point, or several joined by a line."""

    name: str
    points: Sequence[tuple[float, float]]
    spreads: Sequence[float] = ()
    """Half the length of each point's vertical bar; empty for none."""
    colour: int = 0
    """Index of the page's series colours and of the marker's shape."""
    strong: bool = False
    """Drawn thicker, named first."""


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One axis: its name, and whether it is logarithmic (values above zero only)."""

    name: str
    log: bool = False


@dataclass(frozen=True)
class Scale:
    """Values to places along one axis."""

    low: float
    high: float
    start: float
    stop: float
    log: bool

    def __call__(self, value: float) -> float:
        ends = [math.log(v) if self.log else v for v in (self.low, self.high, value)]
        return self.start + (self.stop - self.start) * (ends[2] - ends[0]) / (ends[1] - ends[0])


def chart(
    title: str,
    series: Sequence[Series],
    *,
    x: Axis,
    y: Axis,
    rule: tuple[float, str] | None = None,
    front: bool = False,
) -> str:
    """A figure: series of one point are labelled markers, the others lines named at their end.

    rule: a level with a name, drawn across; named in the title where it is so far off that it would flatten the
    rest. front: join the first points of series that no other beats in both
    (lower is better). Points that are not finite, or not above zero on a logarithmic axis, are left out; with none
    left the figure says so.
    """
    kept = [s for s in (_drawable(s, x, y) for s in series) if s.points]
    if not kept:
        return f'<p class="soft">{html.escape(title)}: no figures.</p>'
    kept.sort(key=lambda s: not s.strong)
    lines = any(len(s.points) > 1 for s in kept)
    bars = [(v, s.spreads[i] if s.spreads else 0.0) for s in kept for i, (_, v) in enumerate(s.points)]
    heights = [v + sign * bar for v, bar in bars for sign in (-1, 1)]
    heights = [v for v in heights if v > 0 or not y.log]
    if rule and not _near(rule[0], heights, y.log):
        title, rule = f"{title} ({rule[1]}: not in the picture)", None
    if rule:
        heights.append(rule[0])
    right = WIDTH - RIGHT - (LABELS if lines and len(kept) > 1 else 0)
    across = _scale([a for s in kept for a, _ in s.points], LEFT, right, x.log)
    up = _scale(heights, HEIGHT - BOTTOM, TOP, y.log)
    parts = [*_axes(across, up, x, y, right)]
    if rule:
        place = up(rule[0])
        parts.append(f'<line class="rule" x1="{LEFT:g}" x2="{right:.1f}" y1="{place:.1f}" y2="{place:.1f}"/>')
        parts.append(text(LEFT + 4, place - 4, rule[1], kind="axis"))
    if front:
        path = " ".join(f"{across(a):.1f},{up(b):.1f}" for a, b in pareto_front([s.points[0] for s in kept]))
        parts.append(f'<polyline class="front" points="{path}"/>')
    for s in sorted(kept, key=lambda s: s.strong):  # what is strong lies on top
        parts.append(_marks(s, across, up, x, y))
    if lines and len(kept) > 1:
        parts += _end_labels(kept, across, up)
    elif not lines:
        parts += _point_labels(kept, across, up, right)
    return figure(title, f"{y.name} against {x.name}", "".join(parts), width=WIDTH, height=HEIGHT)


def _near(level: float, heights: Sequence[float], log: bool) -> bool:
    """Whether a level at most trebles the range of the heights."""
    if log and level <= 0:
        return False
    low, high, place = (math.log(v) if log else v for v in (min(heights), max(heights), level))
    return max(high, place) - min(low, place) <= 3 * (high - low)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other one is below or equal to in both coordinates, from the left."""
    front: list[tuple[float, float]] = []
    for a, b in sorted(points):
        if not front or b < front[-1][1]:
            front.append((a, b))
    return front


def _drawable(series: Series, x: Axis, y: Axis) -> Series:
    good = [
        i
        for i, (a, b) in enumerate(series.points)
        if math.isfinite(a) and math.isfinite(b) and (a > 0 or not x.log) and (b > 0 or not y.log)
    ]
    spreads = [series.spreads[i] for i in good] if series.spreads else []
    return Series(
        name=series.name, points=[series.points[i] for i in good], spreads=spreads, colour=series.colour,
        strong=series.strong,
    )  # fmt: skip


def _scale(values: Sequence[float], start: float, stop: float, log: bool) -> Scale:
    low, high = min(values), max(values)
    if log:
        room = max((high / low) ** 0.06, 1.1)
        return Scale(low / room, high * room, start, stop, log=True)
    room = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
    floor = 0.0 if 0 <= low < 0.35 * high else low - room  # a scale that nearly reaches zero shows it
    return Scale(floor, high + room, start, stop, log=False)


def ticks(scale: Scale) -> list[float]:
    """Round values inside a scale: decades and parts of them on a wide logarithmic one, else steps of 1, 2 or 5."""
    if scale.log:
        decades = range(math.floor(math.log10(scale.low)), math.ceil(math.log10(scale.high)) + 1)
        for heads in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)):
            values = [float(f"{head}e{d}") for d in decades for head in heads]
            found = [value for value in values if scale.low <= value <= scale.high]
            if len(found) >= 3:
                return found
    rough = (scale.high - scale.low) / 5
    power = math.floor(math.log10(rough))
    step = next(head for head in (1, 2, 5, 10) if head * 10.0**power >= rough)
    size = 10.0**power * step
    places = range(math.ceil(scale.low / size), math.floor(scale.high / size) + 1)
    return [float(f"{n * step}e{power}") for n in places]


def _axes(across: Scale, up: Scale, x: Axis, y: Axis, right: float) -> list[str]:
    foot = HEIGHT - BOTTOM
    parts = []
    for value in ticks(up):
        place = up(value)
        parts.append(f'<line class="grid" x1="{LEFT:g}" x2="{right:.1f}" y1="{place:.1f}" y2="{place:.1f}"/>')
        parts.append(text(LEFT - 6, place + 4, short(value), anchor="end", kind="axis"))
    for value in ticks(across):
        place = across(value)
        parts.append(
            f'<line class="grid" x1="{place:.1f}" x2="{place:.1f}" y1="{foot:g}" y2="{foot + 4:g}"/>'
        )
        parts.append(text(place, foot + 16, short(value), anchor="middle", kind="axis"))
    parts.append(text((LEFT + right) / 2, HEIGHT - 6, x.name, anchor="middle", kind="axis"))
    middle = (TOP + foot) / 2
    turn = f' transform="rotate(-90 12 {middle:g})"'
    parts.append(text(12, middle, y.name, anchor="middle", kind="axis", more=turn))
    return parts


def _marks(series: Series, across: Scale, up: Scale, x: Axis, y: Axis) -> str:
    places = [(across(a), up(b)) for a, b in series.points]
    parts = []
    if len(places) > 1:
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
        parts.append(f'<polyline class="trace" points="{path}"/>')
    # A long trace shows its line alone, with an invisible larger target for each tooltip.
    many = len(places) > 40
    for i, ((a, b), (px, py)) in enumerate(zip(series.points, places, strict=True)):
        spread = series.spreads[i] if series.spreads else 0.0
        if spread:
            low = up(b - spread) if b - spread > 0 or not up.log else up.start
            parts.append(
                f'<line class="stem" x1="{px:.1f}" x2="{px:.1f}" y1="{low:.1f}" y2="{up(b + spread):.1f}"/>'
            )
        words = f"{series.name}: {y.name} {b:.4g}{f' ± {spread:.2g}' if spread else ''}, {x.name} {short(a)}"
        parts.append(_marker(px, py, series.colour, series.strong, many, words))
    strong = " strong" if series.strong else ""
    return f'<g class="s{series.colour}{strong}">{"".join(parts)}</g>'


def _marker(x: float, y: float, colour: int, strong: bool, hidden: bool, words: str) -> str:
    r = 6.0 if strong else 4.5
    shapes = {
        0: f"M{x - r:.1f},{y:.1f}a{r:g},{r:g} 0 1 0 {2 * r:g},0a{r:g},{r:g} 0 1 0 {-2 * r:g},0z",
        1: f"M{x - r:.1f},{y - r:.1f}h{2 * r:g}v{2 * r:g}h{-2 * r:g}z",
        2: f"M{x:.1f},{y - 1.3 * r:.1f}l{1.3 * r:g},{1.3 * r:g}l{-1.3 * r:g},{1.3 * r:g}l{-1.3 * r:g},{-1.3 * r:g}z",
        3: f"M{x:.1f},{y - 1.2 * r:.1f}l{1.2 * r:g},{2.1 * r:g}h{-2.4 * r:g}z",
        4: f"M{x:.1f},{y + 1.2 * r:.1f}l{1.2 * r:g},{-2.1 * r:g}h{-2.4 * r:g}z",
    }
    seen = ' fill-opacity="0"' if hidden else ""
    return f'<path class="point" d="{shapes[colour % 5]}"{seen}><title>{html.escape(words)}</title></path>'


def _end_labels(series: Sequence[Series], across: Scale, up: Scale) -> list[str]:
    """Names at the ends of lines, pushed apart where they would overlap; the strong ones keep a place first."""
    room = int((HEIGHT - BOTTOM - TOP) / LINE)
    ends = sorted((up(s.points[-1][1]), i) for i, s in enumerate(series[:room]))
    places: list[float] = []
    for y, _ in ends:
        places.append(max(y, places[-1] + LINE if places else TOP + LINE / 2))
    for i in range(len(places) - 1, -1, -1):  # what was pushed below the foot moves up again
        limit = HEIGHT - BOTTOM if i == len(places) - 1 else places[i + 1] - LINE
        places[i] = min(places[i], limit)
    parts = []
    for (y, i), place in zip(ends, places, strict=True):
        s = series[i]
        x = across(s.points[-1][0])
        start = WIDTH - RIGHT - LABELS
        parts.append(
            f'<g class="s{s.colour}{" strong" if s.strong else ""}"><path class="stem" stroke-opacity=".5" '
            f'd="M{x + 5:.1f},{y:.1f}L{start + 12:.1f},{place:.1f}"/>'
            f"{text(start + 15, place + 4, _cut(s.name, LABELS - 4))}</g>"
        )
    return parts


def _point_labels(series: Sequence[Series], across: Scale, up: Scale, right: float) -> list[str]:
    """Names beside points, each at the first of several places that is free; a name without a place is left to
    the tooltip."""
    marks = [(across(a), up(b)) for s in series for a, b in s.points]
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in marks]
    parts = []
    for s in series:
        name = _cut(s.name, 190)
        wide = LETTER * len(name)
        x, y = across(s.points[0][0]), up(s.points[0][1])
        for dx, dy, anchor in (
            (9, 4, "start"), (-9, 4, "end"), (0, -10, "middle"), (0, 18, "middle"),
            (9, -8, "start"), (9, 16, "start"), (-9, -8, "end"), (-9, 16, "end"),
        ):  # fmt: skip
            start = x + dx - {"start": 0.0, "middle": wide / 2, "end": wide}[anchor]
            box = (start, y + dy - 9, start + wide, y + dy + 2)
            inside = (
                box[0] > LEFT and box[2] < right + RIGHT and box[1] > TOP - 8 and box[3] < HEIGHT - BOTTOM
            )
            if inside and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                strong = ' class="strong"' if s.strong else ""
                parts.append(f"<g{strong}>{text(x + dx, y + dy, name, anchor=anchor)}</g>")
                break
    return parts


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _cut(name: str, room: float) -> str:
    letters = int(room / LETTER)
    return name if len(name) <= letters else name[: letters - 1] + "…"
