"""Heat maps: tables of figures as colours."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence

from kindiff.report.svg import LETTER, LINE, figure, text


def heat(
    title: str,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float]],
    *,
    limit: float,
    show: Callable[[float], str],
    numbers: bool = False,
    breaks: Sequence[int] = (),
) -> str:
    """A figure of coloured cells: from -limit (one hue) over the page's ground at 0 to limit (another hue).

    numbers: write each value into its cell. breaks: rows and columns before which a gap is left.
    """
    side, wide = (26.0, 52.0) if numbers else (13.0, 13.0)
    left = 8 + LETTER * max(map(len, rows))
    top = LINE + 6 if numbers else 8 + LETTER * max(map(len, columns))
    gap = [4.0 * sum(b <= i for b in breaks) for i in range(max(len(rows), len(columns)))]
    width = left + wide * len(columns) + gap[len(columns) - 1] + 2
    height = top + side * len(rows) + gap[len(rows) - 1] + 2
    parts = []
    for j, name in enumerate(columns):
        middle = left + wide * (j + 0.5) + gap[j]
        turn = "" if numbers else f' transform="rotate(-90 {middle + 4:.1f} {top - 4:.1f})"'
        place = middle if numbers else middle + 4
        parts.append(
            text(place, top - 4, name, anchor="middle" if numbers else "start", kind="axis", more=turn)
        )
    for i, name in enumerate(rows):
        y = top + side * i + gap[i]
        parts.append(text(left - 4, y + side / 2 + 4, name, anchor="end", kind="axis"))
        for j, value in enumerate(values[i]):
            share = max(-1.0, min(1.0, value / limit))
            colour = "var(--more)" if share >= 0 else "var(--less)"
            x = left + wide * j + gap[j]
            parts.append(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{wide - 1:.1f}" height="{side - 1:.1f}" '
                f'style="fill: color-mix(in srgb, {colour} {100 * abs(share):.0f}%, var(--tint))">'
                f"<title>{html.escape(f'{name}, {columns[j]}: {show(value)}')}</title></rect>"
            )
            if numbers:
                parts.append(text(x + wide / 2, y + side / 2 + 4, show(value), anchor="middle"))
    return figure(title, title, "".join(parts), width=width, height=height)
