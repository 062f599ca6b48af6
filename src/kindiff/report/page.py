"""One self-contained HTML page: no external request, light and dark, made to be read on a phone too."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kindiff.images import grid, png_bytes
from kindiff.report.style import SCRIPT, STYLE

# The page itself forbids every request, whatever its content were.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A table's cell."""

    text: str
    """What is shown."""
    order: float | None = None
    """What it is sorted by; None for a cell without a number, which stays at the end of a column of numbers."""
    key: int | None = None
    """Index of the series whose colour stands before it."""


def page(title: str, body: Sequence[str]) -> str:
    """The whole document from finished pieces."""
    content = "\n".join(body)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{STYLE}</style></head>\n<body>\n"
        '<button id="theme" type="button" data-theme="auto" hidden>Theme: auto</button>\n'
        f"{content}\n<script>{SCRIPT}</script>\n</body></html>\n"
    )


def heading(text: str, level: int = 2) -> str:
    return f"<h{level}>{html.escape(text)}</h{level}>"


def paragraph(text: str, *, soft: bool = False, strong: bool = False) -> str:
    """A paragraph; `code` between backquotes. soft: an aside; strong: the one that must be read."""
    kind = ' class="soft"' if soft else ' class="strong"' if strong else ""
    return f"<p{kind}>{_marked(text)}</p>"


def bullets(texts: Sequence[str]) -> str:
    """A list of sentences; `code` between backquotes."""
    return "<ul>" + "".join(f"<li>{_marked(text)}</li>" for text in texts) + "</ul>"


def folded(title: str, body: Sequence[str]) -> str:
    """Pieces that are shown when the title is chosen."""
    content = "\n".join(body)
    return f"<details><summary>{html.escape(title)}</summary>\n{content}\n</details>"


def figures(pieces: Sequence[str]) -> str:
    """Figures side by side where there is room."""
    content = "\n".join(pieces)
    return f'<div class="figures">\n{content}\n</div>'


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of figures, the first column a name."""
    head = "".join(f"<th>{html.escape(c)}</th>" for c in columns)
    body = "\n".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def sortable(
    columns: Sequence[str], rows: Sequence[Sequence[str | Cell]], *, marked: Sequence[int] = ()
) -> str:
    """A table that is sorted by a column when its head is chosen; `marked` rows stand out. A column without a single
    number is one of words."""
    words = [all(isinstance(c, str) or c.order is None for c in column) for column in zip(*rows, strict=True)]
    kinds = [' class="words"' if w else "" for w in words]
    head = "".join(f'<th scope="col"{k}>{html.escape(c)}</th>' for c, k in zip(columns, kinds, strict=True))
    lines = []
    for i, row in enumerate(rows):
        cells = "".join(_cell(cell, kind) for cell, kind in zip(row, kinds, strict=True))
        lines.append(f'<tr class="mark">{cells}</tr>' if i in marked else f"<tr>{cells}</tr>")
    body = "\n".join(lines)
    return (
        f'<div class="scroll"><table class="sortable"><thead><tr>{head}</tr></thead><tbody>\n{body}\n'
        "</tbody></table></div>"
    )


def sheet(
    columns: Sequence[str],
    rows: Sequence[tuple[str, Sequence[np.ndarray]]],
    *,
    zoom: int = 1,
    wide: bool = False,
) -> str:
    """Rows of image strips: for each row a label and, for each column, uint8 images (B, H, W, 3).

    wide: many columns, which scroll sideways beside the labels instead of shrinking.
    """
    head = "<th></th>" + "".join(f"<th>{html.escape(c)}</th>" for c in columns)
    body = []
    for label, strips in rows:
        cells = "".join(f"<td>{picture(grid(s, columns=len(s), gap=1), f'{label}: {c}', zoom)}</td>"
                        for c, s in zip(columns, strips, strict=True))  # fmt: skip
        body.append(f'<tr><th scope="row">{html.escape(label)}</th>{cells}</tr>')
    kind = "sheet wide" if wide else "sheet"
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{head}</tr></thead><tbody>\n'
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


def _cell(cell: str | Cell, kind: str) -> str:
    if isinstance(cell, str):
        return f"<td{kind}>{html.escape(cell)}</td>"
    key = "" if cell.key is None else f'<span class="key s{cell.key}"></span>'
    order = "" if kind else f' data-order="{"" if cell.order is None else f"{cell.order:.9g}"}"'
    return f"<td{kind}{order}>{key}{html.escape(cell.text)}</td>"


def _marked(text: str) -> str:
    pieces = html.escape(text).split("`")
    return "".join(f"<code>{piece}</code>" if i % 2 else piece for i, piece in enumerate(pieces))
