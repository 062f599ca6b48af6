"""What a file from elsewhere says of itself, checked before it is believed: links, JSON, headers; and its hash."""

from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

from kindiff.errors import BadFileError

MAX_JSON = 64 * 2**20
MAX_VALUES = 2**22  # commas and opening brackets: a few bytes of text each, but a Python object of 60
SMALL = 2**20  # below it a description may be of any density and in any letters
_SIZES = {"I64": 8, "F64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
MAX_DIMENSIONS = 16


def read_header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Kind and shape of each tensor of a safetensors file; its own numbers are checked before any is believed.

    BadFileError when the header is none, has a key twice, or its shapes, kinds and offsets do not fill the file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist.")
    check_link(path)
    with path.open("rb") as file:
        held = os.fstat(file.fileno()).st_size - 8
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(held, MAX_JSON):
            raise BadFileError(f"{path} is damaged or truncated (no header of safetensors); fetch it again.")
        content = file.read(length)
    try:
        header = parse_json(content)
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        spans = sorted(_span(entry) for entry in entries.values())
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise BadFileError(f"{path} is damaged: its header is not valid ({str(error)[:80]}).") from None
    ends = [0, *(end for _, end in spans)]
    if [start for start, _ in spans] != ends[:-1] or ends[-1] != held - length:
        raise BadFileError(f"{path} is damaged or truncated: its tensors do not fill it; fetch it again.")
    return {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in entries.items()}


def _span(entry: Any) -> tuple[int, int]:
    """Start and end of a tensor's bytes; ValueError unless they are as many as its shape and kind need."""
    start, end = entry["data_offsets"]
    numbers = [start, end, *entry["shape"]]
    if len(numbers) > 2 + MAX_DIMENSIONS or not all(type(n) is int and 0 <= n < 2**48 for n in numbers):
        raise ValueError("a shape or an offset is impossible")
    size = _SIZES.get(entry["dtype"])
    if end < start or (size is not None and math.prod(entry["shape"]) * size != end - start):
        raise ValueError("a tensor's length does not follow from its shape")
    return start, end


def check_link(path: Path) -> None:
    """BadFileError for a link out of its directory: a folder from elsewhere must not show our own files as its.

    The hub's cache, where snapshots link to `blobs` above them, is allowed.
    """
    if not (path.is_symlink() or (path.parent.is_symlink() and path.parent.name == "tailors")):
        return
    target, home = path.resolve(), path.parent.parent.resolve() / path.parent.name
    in_cache = target.parent.name == "blobs" and target.parent.parent in home.parents
    if not in_cache and not target.is_relative_to(home):
        raise BadFileError(f"{path} is a link out of its directory, to {target}; put the file itself there.")


def sha256(path: Path) -> str:
    """SHA-256 of a file, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def parse_json(content: bytes) -> Any:
    """What JSON of a file from elsewhere says; ValueError when it is none, has a key twice or absurdly many values.

    In a file above 1 MiB no value may take less than 4 bytes on average, and letters beyond ASCII must be escaped (as
    ours are): so no list or text made of it is larger than twice the file.
    """
    values = sum(map(content.count, (b",", b"[", b"{")))
    if values > MAX_VALUES or (len(content) > SMALL and values > len(content) // 4):
        raise ValueError(f"{values} values are more than a description of {len(content)} bytes has")
    if len(content) > SMALL and not content.isascii():
        raise ValueError("it is large and has letters beyond ASCII that are not escaped")
    return json.loads(content, object_pairs_hook=_no_key_twice)


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a key stands twice")
    return dict(pairs)
