"""A cache of its own for every test, and a small image folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KINDIFF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes: three red pictures, two blue."""
    path = tmp_path / "photos"
    for name, colour, count in (("fox", (255, 0, 0), 3), ("owl", (0, 0, 255), 2)):
        (path / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (40, 30), colour).save(path / name / f"{i}.png")
    return path
