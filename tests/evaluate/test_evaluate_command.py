"""kindiff evaluate: exit codes, one sentence an error, JSON, resuming, comparing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from kindiff.cli.evaluate import Args, run
from kindiff.cli.main import main
from kindiff.data.avatars import open_avatars
from kindiff.errors import UsageError
from kindiff.images import write_folder

CLASSES = ("rings", "stripes", "waves")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def own_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KINDIFF_CACHE", str(cache))


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    """Images that the reference has not: seeds from 400 on."""
    images = open_avatars("base", size=32, classes=CLASSES, per_class=4, first=400)
    write_folder(tmp_path / "samples", images.images, [CLASSES[i] for i in images.labels])
    return tmp_path / "samples"


def args(samples: Path, **more: object) -> Args:
    return Args(samples=samples, classes=CLASSES, per_class=6, **more)  # type: ignore[arg-type]


def test_a_folder_is_scored(samples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(args(samples, out=tmp_path / "out", json=True))
    told = capsys.readouterr()
    score = json.loads(told.out)
    assert score["distance_name"] == "FD (Lite0)"
    assert score["accuracy"] > 0.7  # of 12
    assert score["protocol"]["count"] == 12
    assert score == json.loads((tmp_path / "out" / "score.json").read_text())
    assert "12 samples are not more than the 1280 feature dimensions" in told.err
    shards = sorted((tmp_path / "out" / "features").glob("*.safetensors"))
    made = [path.stat().st_mtime_ns for path in shards]
    run(args(samples, out=tmp_path / "out", compare=tmp_path / "out" / "score.json"))
    told = capsys.readouterr()
    assert "FD (Lite0)" in told.out
    assert "real/real floor" in told.out
    assert "two disjoint sets of 9 real images (18 are kept" in told.out
    assert "+0.000 now" in told.err
    assert [path.stat().st_mtime_ns for path in shards] == made  # nothing was computed again
    with pytest.raises(UsageError, match="protocols differ in 'reference_sha256'"):
        run(Args(samples=samples, classes=CLASSES, per_class=5, compare=tmp_path / "out" / "score.json"))


def test_mistakes_end_with_a_sentence_and_a_code(
    tmp_path: Path, samples: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    weights = tmp_path / "w.pth"
    weights.write_bytes(b"no weights")
    for argv, code, message in (
        ([str(tmp_path / "none")], 1, "does not exist; give a folder"),
        ([str(tmp_path / "empty")], 2, "has no images"),
        ([str(samples), "--count", "5"], 2, "no model directory"),
        ([str(samples), "--feature-batch", "0"], 2, "feature_batch is 0"),
        ([str(samples), "--weights", str(weights)], 2, "lite0 brings its own"),
        ([str(samples), "--features", "inception", "--weights", str(weights)], 1, "is expected"),
        ([str(samples), "--reference", "avatars:bass"], 2, "did you mean 'base'"),
        ([str(samples), "--classes", "ringss"], 2, "did you mean 'rings'"),
        ([str(samples), "--compare", str(weights)], 1, "not valid JSON"),
    ):
        assert main(["evaluate", *argv]) == code
        told = capsys.readouterr()
        assert message in told.err.splitlines()[-1]
        assert told.err.splitlines()[-1].startswith("kindiff: ")
        assert told.out == ""


def test_an_npz_against_a_flat_folder(
    tmp_path: Path, samples: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in sorted(samples.rglob("*.png"))[::2]:
        (flat / path.name).write_bytes(path.read_bytes())
    images = open_avatars("base", size=32, classes=CLASSES, per_class=2)
    np.savez(tmp_path / "samples.npz", images.images)
    run(
        Args(
            samples=tmp_path / "samples.npz", reference=str(flat), save_reference=tmp_path / "ref", json=True
        )
    )
    first = json.loads(capsys.readouterr().out)
    assert first["protocol"]["count"] == 6
    assert first["accuracy"] is None
    run(Args(samples=tmp_path / "samples.npz", reference=str(tmp_path / "ref"), json=True))
    again = json.loads(capsys.readouterr().out)
    assert again["distance"] == first["distance"]
    assert again["protocol"] == first["protocol"]
