"""kindiff data check: one look through a folder, a list, and training that follows it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kindiff.cli.main import main
from kindiff.config import DataConfig
from kindiff.data import open_images
from kindiff.errors import BadFileError, UsageError
from toys import write_image_folder

SHAPES = ("disc", "bars")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setenv("KINDIFF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve good images and one of each fault."""
    folder = write_image_folder(tmp_path / "photos", SHAPES)
    content = (folder / "disc" / "0.png").read_bytes()
    (folder / "disc" / "empty.png").write_bytes(b"")
    (folder / "disc" / "cut.png").write_bytes(content[: len(content) // 2])
    (folder / "disc" / "page.png").write_bytes(b"<html></html>")
    (folder / "bars" / "twin.png").write_bytes(content)
    Image.fromarray(np.ones((9, 9), np.int32)).save(folder / "bars" / "mode.tiff")
    Image.new("1", (20_000, 20_000)).save(folder / "bars" / "huge.png")
    return folder


FAULTS = {
    "bars/huge.png": "pixels", "bars/mode.tiff": "mode I", "disc/0.png": "the same bytes as bars/twin.png",
    "disc/cut.png": "", "disc/empty.png": "empty", "disc/page.png": "identify",
}  # fmt: skip


def read(folder: Path, **more: object):
    return open_images(DataConfig(source=str(folder), size=16, **more))


def test_every_fault_is_listed_and_left_out(folder: Path, tmp_path: Path, capfd) -> None:
    assert main(["data", "check", str(folder)]) == 0
    captured = capfd.readouterr()
    lines = dict(line.split("\t") for line in captured.out.splitlines())
    assert lines.keys() == FAULTS.keys()
    assert all(FAULTS[name] in reason for name, reason in lines.items())
    assert "6 of 18 files are left out of training" in captured.err
    assert json.loads((folder / "quarantine.json").read_text())["checked"] == 18

    good = tmp_path / "good"
    shutil.copytree(folder, good)
    for name in FAULTS:
        (good / name).unlink()
    (good / "quarantine.json").unlink()
    listed, alone = read(folder, strict=True), read(good, strict=True)
    assert listed.sha256 == alone.sha256
    assert (listed.images == alone.images).all()
    assert listed.counts() == alone.counts() == [7, 5]
    assert not listed.skipped


def test_duplicates_may_stay_and_the_list_may_go_elsewhere(folder: Path, tmp_path: Path, capfd) -> None:
    before = sorted(folder.rglob("*"))
    command = [
        "data",
        "check",
        str(folder),
        "--out",
        str(tmp_path / "list.json"),
        "--keep-duplicates",
        "--json",
    ]
    assert main(command) == 0
    printed = json.loads(capfd.readouterr().out)
    assert {e["file"] for e in printed["files"]} == FAULTS.keys() - {"disc/0.png"}
    assert sorted(folder.rglob("*")) == before


def test_what_the_list_cannot_be(folder: Path, tmp_path: Path, capfd) -> None:
    for text in ("{", "{}", '{"format": 1, "kind": "quarantine", "files": [{"file": 1, "reason": ""}]}'):
        (folder / "quarantine.json").write_text(text)
        with pytest.raises(BadFileError, match=r"quarantine\.json"):
            read(folder)
    every = [{"file": f"disc/{p.name}", "reason": "x"} for p in (folder / "disc").iterdir()]
    (folder / "quarantine.json").write_text(json.dumps({"format": 1, "kind": "quarantine", "files": every}))
    with pytest.raises(UsageError, match="disc has no readable image"):
        read(folder)
    assert main(["data", "check", str(tmp_path / "nowhere")]) == 1
    assert "does not exist" in capfd.readouterr().err
