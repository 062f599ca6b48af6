"""The model card: what a run recorded, and nothing else."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from kindiff.bridges.card import push_to_hub, write_card
from kindiff.cli.main import main
from kindiff.components import factorize
from kindiff.config import DiTConfig, KindConfig
from kindiff.errors import BadFileError, UsageError
from random_models import noisy_dit

RUN = {
    "description": {
        "command": "pretrain",
        "data": "abcdef0123456789ffff",
        "config": {
            "data": {"source": "avatars:base"},
            "train": {"steps": 2000, "batch": 64, "lr": 1e-3, "precision": "bf16", "seed": 0},
            "init": "",
        },
    },
    "versions": {"kindiff": "0.1.0", "torch": "2.13.0"},
    "hardware": {"processor": "some cpu", "cores": 2, "gpu": None},
}
SCORE = {
    "protocol": {"features": "lite0", "count": 1950},
    "distance_name": "FD (Lite0)",
    "distance": 71.25,
    "floor": 64.5,
    "floor_note": "of 1950 images",
    "recall": None,
    "accuracy": 0.93,
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    config = DiTConfig(input_size=8, channels=3, num_classes=3, width=32, depth=2, heads=4, patch=2)
    dense = noisy_dit(config, ("ant", "bee", "cat"))
    factorize(dense, KindConfig(learngene_rank=8, tailor_rank=2)).save_pretrained(tmp_path / "run" / "model")
    (tmp_path / "run" / "run.json").write_text(json.dumps(RUN))
    (tmp_path / "score.json").write_text(json.dumps(SCORE))
    return tmp_path / "run"


def test_a_card_tells_data_protocol_scores_and_cost(run: Path) -> None:
    text = write_card(run / "model", scores=run.parent / "score.json")
    assert (run / "model" / "README.md").read_text() == text
    assert text.startswith("---\nlibrary_name: kindiff\n")
    for line in (
        "| Backbone | DiT, width 32, depth 2, 4 heads, patch 2 |",
        "| Components | learngene rank 8, 3 tailors of rank 2, gate table |",
        "| Data | avatars:base, SHA-256 abcdef0123456789 |",
        "| Steps | 2,000 of 64 samples, learning rate 0.001 |",
        "| Hardware | some cpu, 2 cores |",
        "| FD (Lite0) | 71.2500 |",
        "| real/real floor | 64.5000 of 1950 images |",
        "| accuracy | 0.9300 |",
        "| protocol: count | 1950 |",
        "# run",
    ):
        assert line in text, line
    assert "GMACs an image" in text
    assert "recall" not in text


def test_what_is_not_recorded_is_left_out(run: Path, tmp_path: Path) -> None:
    config = DiTConfig(input_size=8, channels=3, num_classes=1, width=32, depth=1, heads=4, patch=2)
    noisy_dit(config, ("ant",)).save_pretrained(tmp_path / "alone" / "dense")
    text = write_card(tmp_path / "alone" / "dense")
    assert "## Training" not in text
    assert "## Scores" not in text
    assert "Diffusion transformer made with kindiff" in text
    assert "## Training" in write_card(tmp_path / "alone" / "dense", run=run)


def test_cards_that_cannot_be_made(run: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no model directory"):
        write_card(tmp_path)
    with pytest.raises(FileNotFoundError, match="no run directory"):
        write_card(run / "model", run=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"scores .* do not exist"):
        write_card(run / "model", scores=tmp_path / "none.json")
    with pytest.raises(BadFileError, match="holds no scores"):
        write_card(run / "model", scores=run / "run.json")


class Hub:
    """In the hub's place: it notes what it is asked for."""

    calls: tuple = ()

    def create_repo(self, repository: str, *, private: bool, exist_ok: bool) -> None:
        Hub.calls += (("create", repository, private),)

    def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> None:
        Hub.calls += (("upload", repo_id, Path(folder_path).name),)


def test_pushing_uploads_the_model_with_its_card(run: Path, monkeypatch, capsys) -> None:
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub, "HfApi", Hub)
    with pytest.raises(UsageError, match=r"has no README\.md"):
        push_to_hub(run / "model", "me/avatars")
    assert main(["push", str(run / "model"), "me/avatars", "--dry-run"]) == 0
    assert Hub.calls == ()
    assert "library_name: kindiff" in capsys.readouterr().out
    assert main(["push", str(run / "model"), "me/avatars", "--private"]) == 0
    assert Hub.calls == (("create", "me/avatars", True), ("upload", "me/avatars", "model"))
    assert capsys.readouterr().out.strip() == "https://huggingface.co/me/avatars"


def test_a_hub_that_does_not_take_it(run: Path, monkeypatch, capsys) -> None:
    hub = pytest.importorskip("huggingface_hub")
    assert main(["push", str(run / "model"), "not/a/name"]) == 2
    assert "'not/a/name' is no name of a repository" in capsys.readouterr().err

    class Refusing(Hub):
        def create_repo(self, *_: object, **__: object) -> None:
            raise RuntimeError("no way there")

    monkeypatch.setattr(hub, "HfApi", Refusing)
    assert main(["push", str(run / "model"), "me/avatars"]) == 1
    assert "the hub did not take" in capsys.readouterr().err


def test_a_missing_hub_library_is_named(run: Path, monkeypatch) -> None:
    write_card(run / "model")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ModuleNotFoundError, match=r"kindiff\[hf\]"):
        push_to_hub(run / "model", "me/avatars")
