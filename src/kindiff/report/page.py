"""One self-contained HTML page: no external request, light and dark, made to be read on a phone too."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence

import numpy as np

from kindiff.images import grid, png_bytes

STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --soft: #5c6370; --paper: #fdfdfb; --line: #d9dbd6; --tint: #f2f3ef; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e3; --soft: #a0a6ad; --paper: #17181a; --line: #36393d; --tint: #202225; } }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 66rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .5rem; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .3rem; }
p { max-width: 44rem; margin: .4rem 0; } .soft { color: var(--soft); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: .8rem 0; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .3rem .7rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 600; color: var(--soft); } th:first-child, td:first-child { text-align: left; }
.sheet td, .sheet th { text-align: left; padding: .15rem .4rem; border: 0; }
.sheet img { display: block; image-rendering: pixelated; border-radius: 3px; background: var(--tint); }
@media (max-width: 40rem) { .sheet { font-size: .75rem; } .sheet td, .sheet th { white-space: normal; }
  .sheet img { width: 23vw; height: auto; } }
code { background: var(--tint); padding: .1em .3em; border-radius: 3px; }
"""


def page(title: str, body: Sequence[str]) -> str:
    """The whole document from finished pieces."""
    content = "\n".join(body)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{STYLE}</style></head>\n<body>\n{content}\n</body></html>\n"
    )


def heading(text: str, level: int = 2) -> str:
    return f"<h{level}>{html.escape(text)}</h{level}>"


def paragraph(text: str, *, soft: bool = False) -> str:
    """A paragraph; `code` between backquotes."""
    pieces = html.escape(text).split("`")
    marked = "".join(f"<code>{piece}</code>" if i % 2 else piece for i, piece in enumerate(pieces))
    return f'<p class="soft">{marked}</p>' if soft else f"<p>{marked}</p>"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of figures, the first column a name."""
    head = "".join(f"<th>{html.escape(c)}</th>" for c in columns)
    body = "\n".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def sheet(columns: Sequence[str], rows: Sequence[tuple[str, Sequence[np.ndarray]]], *, zoom: int = 1) -> str:
    """Rows of image strips: for each row a label and, for each column, uint8 images (B, H, W, 3)."""
    head = "<th></th>" + "".join(f"<th>{html.escape(c)}</th>" for c in columns)
    body = []
    for label, strips in rows:
        cells = "".join(f"<td>{picture(grid(s, columns=len(s), gap=1), f'{label}: {c}', zoom)}</td>"
                        for c, s in zip(columns, strips, strict=True))  # fmt: skip
        body.append(f"<tr><td>{html.escape(label)}</td>{cells}</tr>")
    return (
        f'<div class="scroll"><table class="sheet"><thead><tr>{head}</tr></thead><tbody>\n'
        + "\n".join(body)
        + "\n</tbody></table></div>"
    )


def picture(image_HWC: np.ndarray, alt: str, zoom: int = 1) -> str:
    """An embedded PNG, shown `zoom` times its size."""
    data = base64.b64encode(png_bytes(image_HWC)).decode()
    height, width = image_HWC.shape[:2]
    return (
        f'<img alt="{html.escape(alt, quote=True)}" width="{width * zoom}" height="{height * zoom}" '
        f'src="data:image/png;base64,{data}">'
    )
