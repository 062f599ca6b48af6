"""Manifests and arrays that are wrong on purpose: refused before anything is allocated, the file named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kindiff.data import open_prepared
from kindiff.data.manifest import content_hash
from kindiff.data.prepared import write_prepared
from kindiff.errors import BadFileError

SIZE = 4


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    target = tmp_path / "set"
    pixels = np.random.default_rng(0).integers(0, 256, (12, SIZE, SIZE, 3), dtype=np.uint8)
    parts = [("ant", pixels[:5]), ("bee", pixels[5:8]), ("cat", pixels[8:])]
    write_prepared(target, parts, size=SIZE, source="a test")
    return target


def edit(directory: Path, **changes: Any) -> None:
    """Change the manifest and make its hash follow, as a careful but wrong writer would."""
    file = directory / "manifest.json"
    values = json.loads(file.read_text()) | changes
    entries = values["classes"]
    if isinstance(entries, list) and all(isinstance(e, dict) for e in entries):
        columns = [[e.get(k) for e in entries] for k in ("name", "count", "sha256")]
        values["sha256"] = content_hash(values["size"], *columns)
    file.write_text(json.dumps(values))


def replace_array(directory: Path, content: bytes) -> None:
    (directory / "images.npy").write_bytes(content)
    files = {"images.npy": {"bytes": len(content), "sha256": "0" * 64}}
    edit(directory, files=files)


def test_not_an_array(directory: Path) -> None:
    replace_array(directory, b"GIF89a, not an array at all" * 10)
    with pytest.raises(BadFileError, match="is not a NumPy array"):
        open_prepared(directory, verify=False)


def test_pickled_array_is_not_loaded(directory: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "evil.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    replace_array(directory, (tmp_path / "evil.npy").read_bytes())
    with pytest.raises(BadFileError, match="is not a NumPy array"):
        open_prepared(directory, verify=False)


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros((12, SIZE, SIZE, 4), np.uint8),
        np.zeros((12, SIZE, SIZE, 3), np.int8),
        np.asfortranarray(np.zeros((12, SIZE, SIZE, 3), np.uint8)),
    ],
)
def test_another_array(directory: Path, tmp_path: Path, wrong: np.ndarray) -> None:
    np.save(tmp_path / "wrong.npy", wrong)
    replace_array(directory, (tmp_path / "wrong.npy").read_bytes())
    with pytest.raises(BadFileError, match="as its manifest says"):
        open_prepared(directory, verify=False)


ENTRY = {"name": "ant", "count": 5, "sha256": "0" * 64}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format": 2}, "format is 2"),
        ({"kind": "latents"}, "kind 'latents'"),
        ({"size": 10**9}, "size is 1000000000"),
        ({"size": 0}, "size is 0"),
        ({"size": True}, "size is 'True'"),
        ({"size": "32"}, "no int"),
        ({"classes": [ENTRY | {"count": 2**63}]}, "count is"),
        ({"classes": [ENTRY | {"count": -1}]}, "count is -1"),
        ({"classes": [ENTRY | {"count": 2.5}]}, "count is '2.5'"),
        ({"classes": [ENTRY | {"name": "../../etc/passwd"}]}, "cannot be used"),
        ({"classes": [ENTRY | {"name": 3}]}, "name is '3'"),
        ({"classes": [ENTRY, ENTRY]}, "twice"),
        ({"classes": []}, "at least one class"),
        ({"classes": ["ant"]}, "no object"),
        ({"classes": {"ant": 5}}, "no list"),
        ({"files": {"../images.npy": {"bytes": 1, "sha256": "0" * 64}}}, r"images\.npy alone"),
        ({"files": {"images.npy": {"bytes": 2**70, "sha256": "0" * 64}}}, "bytes is"),
        ({"files": {"images.npy": {"bytes": 9, "sha256": "xyz"}}}, "no SHA-256"),
        ({"skipped": [3]}, "skipped is no object"),
        ({"source": None}, "source is 'None'"),
    ],
)
def test_absurd_manifest(directory: Path, changes: dict[str, Any], said: str) -> None:
    edit(directory, **changes)
    with pytest.raises(BadFileError, match=said) as caught:
        open_prepared(directory)
    assert str(directory / "manifest.json") in str(caught.value)


def test_manifest_with_more_images_than_the_file(directory: Path) -> None:
    entries = json.loads((directory / "manifest.json").read_text())["classes"]
    entries[0]["count"] = 10**9
    edit(directory, classes=entries)
    with pytest.raises(BadFileError, match="as its manifest says"):
        open_prepared(directory)


def test_edited_manifest(directory: Path) -> None:
    file = directory / "manifest.json"
    file.write_text(file.read_text().replace('"ant"', '"fly"'))
    with pytest.raises(BadFileError, match="does not follow from its classes"):
        open_prepared(directory)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"{" * 100000])
def test_manifest_that_is_no_json(directory: Path, content: bytes) -> None:
    (directory / "manifest.json").write_bytes(content)
    with pytest.raises(BadFileError, match=r"manifest\.json"):
        open_prepared(directory)


def test_no_set(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no manifest\.json"):
        open_prepared(tmp_path)
