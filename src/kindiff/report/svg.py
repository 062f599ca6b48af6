"""Pieces of drawings as inline SVG in the page's own colours, so that light and dark need one drawing."""

from __future__ import annotations

import html

LINE = 12.0
"""Height of a line of text."""
LETTER = 5.8
"""Mean width of a letter."""


def figure(title: str, described: str, content: str, *, width: float, height: float) -> str:
    """A drawing with a title above it; `described` is read out in its place."""
    caption = f"<figcaption>{html.escape(title)}</figcaption>"
    # A small drawing is not blown up to the width of the page; a large one scrolls instead of shrinking away.
    style = f"max-width: {1.5 * width:.0f}px; min-width: {min(0.7 * width, 640):.0f}px"
    return (
        f'<figure>{caption}<div class="scroll"><svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" '
        f'style="{style}" aria-label="{html.escape(described, quote=True)}">{content}</svg></div></figure>'
    )


def text(x: float, y: float, word: str, *, anchor: str = "start", kind: str = "", more: str = "") -> str:
    """A word in a drawing; `more` are further attributes."""
    named = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{named}{more}>{html.escape(word)}</text>'


def short(value: float) -> str:
    """A figure for an axis: 0.05, 12, 3.5k, 2M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"
