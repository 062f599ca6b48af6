"""Files: tensors in safetensors, everything else in JSON, directories that appear whole or not at all.

Nothing is pickled. A directory is written under a temporary name beside its target, synced, then renamed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kindiff.errors import BadFileError, UsageError
from kindiff.headers import MAX_JSON, check_link, parse_json, read_header
from kindiff.headers import sha256 as sha256

FORMAT = 1
_SAFETENSORS_NAMES = {  # in the order in which the library writes them
    torch.int64: "I64", torch.float64: "F64", torch.float32: "F32", torch.int32: "I32", torch.bfloat16: "BF16",
    torch.float16: "F16", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
PICTURES, UNKNOWN = "pictures", "unknown"
INDEX = "model_index.json"
"""Of a folder that diffusers wrote."""


@contextlib.contextmanager
def new_directory(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Write a directory's files into what this yields; on success it becomes `target`, replacing an older one.

    On any failure (a full disk, an interruption) the temporary directory is removed and an existing target is
    left as it was. UsageError when the target is something else than an older directory of the same sort, unless
    `overwrite`.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.tmp"
    temporary.mkdir()
    try:
        yield temporary
        for path in sorted(temporary.rglob("*")):
            _sync(path)
        _sync(temporary)
        if not overwrite:
            check_replaceable(target, sort_of(temporary))
        if target.exists():
            _exchange(target, temporary)
        else:
            temporary.rename(target)
        _sync(target.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _exchange(target: Path, temporary: Path) -> None:
    retired = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.old"
    try:
        target.rename(retired)
        temporary.rename(target)
    except BaseException:
        if retired.exists() and not target.exists():
            retired.rename(target)
        raise
    shutil.rmtree(retired)


def check_replaceable(target: Path, sort: str) -> None:
    """UsageError unless a directory of this sort (see sort_of) may be written to `target`: nothing else is lost."""
    if target.is_dir():
        if not any(target.iterdir()) or (sort != UNKNOWN and sort_of(target) == sort):
            return
        raise UsageError(f"{target} holds other files, which would be lost; give another path or remove it.")
    if target.exists():
        raise UsageError(
            f"{target} is a file and a directory is to be written; give another path or remove it."
        )


def sort_of(folder: Path) -> str:
    """What a directory of ours, or of diffusers', is by its description: two of one sort may replace each other, but
    for UNKNOWN ones."""
    for name in (INDEX, "config.json", "manifest.json", "reference.json"):
        if (folder / name).is_file():
            try:
                description = read_json(folder / name)
            except BadFileError:
                return f"damaged {name}"
            kind = description.get("kind") or description.get("_class_name")
            return f"{name} of kind {kind}" if kind or name == "reference.json" else UNKNOWN
    inside = {sort_of(path) if (path / INDEX).is_file() else UNKNOWN for path in folder.iterdir()}
    if len(inside) == 1 and inside != {UNKNOWN}:
        return f"folders with {inside.pop()}"
    names = {path.name for path in folder.rglob("*") if not path.is_dir()}
    return PICTURES if all(re.fullmatch(r"\d{6}\.png", name) for name in names) else UNKNOWN


def write_file(path: Path, content: bytes) -> None:
    """Replace one file atomically."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.write_bytes(content)
        _sync(temporary)
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """JSON with sorted keys and a final newline, replacing an older file atomically."""
    write_file(path, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; BadFileError when the file is none, has a key twice, or is absurdly large."""
    check_link(path)
    if path.stat().st_size > MAX_JSON:
        raise BadFileError(f"{path} has {path.stat().st_size} bytes; a description is never that large.")
    try:
        value = parse_json(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise BadFileError(
            f"{path} is not valid JSON ({error}); it is damaged or not a kindiff file."
        ) from None
    if not isinstance(value, dict):
        raise BadFileError(f"{path} holds {type(value).__name__}, not an object; it is not a kindiff file.")
    return value


def read_description(folder: Path, kind: str, *, wanted: str) -> dict[str, Any]:
    """The config.json of a directory of ours; `wanted` ends the sentence for one of another kind or format.

    FileNotFoundError when there is none, BadFileError when it describes something else, UsageError for a run.
    """
    path = folder / "config.json"
    if (folder / "run.json").is_file():
        raise UsageError(f"{folder} is a run; its model is {folder / 'model'}.")
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is no {kind} directory: it has no config.json.")
    description = read_json(path)
    if description.get("kind") != kind or description.get("format") != FORMAT:
        raise BadFileError(
            f"{path} describes {description.get('kind')!r}, format {description.get('format')!r}; {wanted}."
        )
    return description


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> str:
    """Tensors as one safetensors file, written one by one; returns the SHA-256 of what was to be written.

    Equal contents give equal bytes.
    """
    types = list(_SAFETENSORS_NAMES)
    names = sorted(tensors, key=lambda name: (types.index(tensors[name].dtype), name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in names:
        start, end = end, end + tensors[name].nbytes
        kind = _SAFETENSORS_NAMES[tensors[name].dtype]
        header[name] = {"dtype": kind, "shape": list(tensors[name].shape), "data_offsets": [start, end]}
    head = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    head += b" " * (-len(head) % 8)
    head = len(head).to_bytes(8, "little") + head
    digest = hashlib.sha256(head)
    with path.open("wb") as file:
        file.write(head)
        for name in names:
            content = tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
            digest.update(content)
            file.write(content)
    return digest.hexdigest()


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file; BadFileError names a truncated or foreign file."""
    with open_tensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@contextlib.contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """A safetensors file open for reading single tensors and its metadata."""
    read_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise BadFileError(f"{path} is damaged or truncated ({error}); fetch or make it again.") from None


def check_depth(path: Path, depth: int) -> None:
    """BadFileError when a description has more blocks than the file has tensors: it need not be built to know."""
    if depth > len(read_header(path)):
        raise BadFileError(
            f"{path} is of another architecture: it has fewer tensors than its config.json has blocks ({depth})."
        )


def check_tensors(path: Path, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """BadFileError unless a file's tensors have exactly the wanted names, shapes and dtypes."""
    missing = sorted(wanted.keys() - found.keys())
    extra = sorted(found.keys() - wanted.keys())
    if missing or extra:
        fault = f"lacks {missing[0]!r}" if missing else f"has the unknown tensor {extra[0]!r}"
        raise BadFileError(
            f"{path} is of another architecture: it {fault} ({len(missing)} missing, {len(extra)} unknown); "
            "use the config.json that it was saved with."
        )
    for name, tensor in wanted.items():
        if found[name].shape != tensor.shape or found[name].dtype != tensor.dtype:
            raise BadFileError(
                f"{path} is of another architecture: {name} is {_kind(found[name])}, the config asks for "
                f"{_kind(tensor)}; use the config.json that it was saved with."
            )


def check_hash(path: Path, found: Mapping[str, Tensor], recorded: str | None) -> None:
    """BadFileError unless a file's tensors have the recorded hash_tensors; None: none was recorded."""
    if recorded is not None and hash_tensors(found) != recorded:
        raise BadFileError(f"{path} is damaged: its hash is not the recorded one; fetch or make it again.")


def sha256_on_disk(path: Path) -> str:
    """SHA-256 of a file as the disk has it: synced, then read past the memory's copy where the system allows it."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bits, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {_kind(tensor)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
