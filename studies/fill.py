"""Write what commands print into a document: `python studies/fill.py docs/results.md` (`--check`: only compare).

A block begins with the line `<!-- $ kindiff ... -->` and ends with `<!-- end -->`; between them stands what the command
prints to stdout.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import sys
from pathlib import Path

BLOCK = re.compile(r"(<!-- \$ kindiff ([^\n]*?) -->\n).*?(<!-- end -->)", re.DOTALL)


def printed(command: str) -> str:
    """Stdout of a kindiff command, which is run in this process."""
    from kindiff.cli.main import main

    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = main(shlex.split(command))
    if code:
        sys.exit(f"kindiff {command} ended with code {code}")
    return out.getvalue()


def filled(text: str) -> str:
    """The document with its blocks made anew."""
    return BLOCK.sub(lambda m: f"{m[1]}\n{printed(m[2]).strip()}\n\n{m[3]}", text)


def main(path: Path, *, check: bool) -> int:
    text = path.read_text()
    new = filled(text)
    if check and new != text:
        print(
            f"{path} does not say what its commands print; run: python studies/fill.py {path}",
            file=sys.stderr,
        )
        return 1
    if not check:
        path.write_text(new)
    return 0


if __name__ == "__main__":
    arguments = [a for a in sys.argv[1:] if a != "--check"]
    if len(arguments) != 1:
        sys.exit("usage: python studies/fill.py [--check] DOCUMENT")
    sys.exit(main(Path(arguments[0]), check="--check" in sys.argv))
