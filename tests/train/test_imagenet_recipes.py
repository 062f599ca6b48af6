"""The recipes of ImageNet: each parses, prints its plan at full size, and takes real steps on a shrunken data set."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kindiff.cli.main import main
from kindiff.components import load_components
from kindiff.config import (
    AutoencoderConfig,
    EncodeConfig,
    PretrainConfig,
    SampleConfig,
    TransferConfig,
    load_recipe,
)
from kindiff.data.groups import IMAGENET_TASKS, imagenet_grouping
from kindiff.data.hierarchy import imagenet
from kindiff.models import DiT
from kindiff.models.autoencoder import Autoencoder

RECIPES = Path(__file__).parents[2] / "recipes" / "imagenet"
KINDS = {
    "kind": PretrainConfig, "dense": PretrainConfig, "transfer": TransferConfig, "shift": TransferConfig,
    "encode": EncodeConfig, "evaluate": SampleConfig,
}  # fmt: skip
SIZES = ("dit-b-2", "dit-l-2")
SHIFTS = ("celeba-hq", "hubble", "mri", "pokemon")


def run(capsys, *arguments: object) -> str:
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def test_every_recipe_parses() -> None:
    names = {path.stem for path in RECIPES.glob("*.toml")}
    assert names == {f"{size}-{kind}" for size in SIZES for kind in list(KINDS)[:4]} | {"encode", "evaluate"}
    for name in names:
        load_recipe(RECIPES / f"{name}.toml", KINDS[name.rsplit("-", 1)[-1]])


def test_the_headline_from_the_dry_run(tmp_path: Path, capsys, monkeypatch) -> None:
    """45.4M trainable parameters and at least 35.4 GMACs saved (KIND's abstract), for each task and shift."""
    monkeypatch.chdir(tmp_path)
    kind, tasks = RECIPES / "dit-l-2-kind.toml", [f"novel-{size}" for size in IMAGENET_TASKS]
    runs = [("transfer", "--data.split", task) for task in tasks]
    runs += [("shift", "--data.source", f"data/{shift}-latents") for shift in SHIFTS]
    for recipe, *options in runs:
        out = run(
            capsys, "transfer", kind, "run", "--config", RECIPES / f"dit-l-2-{recipe}.toml", "--dry-run", *options
        )  # fmt: skip
        assert "(45.4M)" in out or (options[-1] == "novel-100" and "(45.5M)" in out)
        saved = float(re.search(r"the dense model 80\.\d+: ([\d.]+) saved", out).group(1))
        assert saved >= 35.4
        assert "missing" in out
        assert "not measured: the data are missing" in out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("recipe", "parameters", "saved"),
    [("dit-l-2-kind", 603_687_552, 46.8), ("dit-l-2-dense", 456_970_272, 0.0),
     ("dit-b-2-kind", 152_270_432, 13.2), ("dit-b-2-dense", 129_663_008, 0.0)],
)  # fmt: skip
def test_plans_of_the_pre_trainings(recipe, parameters, saved, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    out = run(capsys, "pretrain", "run", "--config", RECIPES / f"{recipe}.toml", "--dry-run")
    assert f"{parameters:,}, {parameters:,} of them train" in out
    assert float(re.search(r": ([\d.]+) saved", out).group(1)) == pytest.approx(saved, abs=0.06)
    assert "4 x 32 x 32 and 150 classes" in out
    assert "400,000 steps of 256: 102,400,000 images" in out
    assert re.search(r"memory +about [\d.]+ GiB at 256 images \(weights", out)


# Real steps on a shrunken data set


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A picture for each of ImageNet's 1000 classes, another set for the shifts, and latents of both."""
    place = tmp_path_factory.mktemp("imagenet")
    random = np.random.default_rng(0)
    for folder, names in (("train", imagenet().classes), ("hubble", ("nebula", "galaxy"))):
        for name in names:
            (place / folder / name).mkdir(parents=True)
            for k in range(1 if folder == "train" else 8):
                colours = random.integers(0, 256, (2, 2, 3), np.uint8)
                Image.fromarray(colours).resize((16, 16)).save(place / folder / name / f"{k}.png")
    torch.manual_seed(0)
    Autoencoder(AutoencoderConfig(width=8)).save_pretrained(place / "vae")
    for folder in ("train", "hubble"):
        arguments = [
            "encode", place / f"{folder}-latents", "--config", RECIPES / "encode.toml", "--data.source",
            place / folder, "--data.size", 16, "--autoencoder", place / "vae", "--workers", 1,
        ]  # fmt: skip
        assert main([str(argument) for argument in arguments]) == 0
    return place


TINY = [
    "--data.latent-shape", 4, 4, "--train.steps", 3, "--train.batch", 8, "--train.workers", 0,
    "--train.save-every", 3, "--train.log-every", 1, "--train.precision", "fp32",
]  # fmt: skip


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_real_steps(size: str, small: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("KINDIFF_CACHE", str(tmp_path / "cache"))
    shape = ["--model.preset", "DiT-T/2"]
    tiny = [*TINY, "--data.source", small / "train-latents"]
    ranks = ["--kind.learngene-rank", 16, "--kind.tailor-rank", 1]
    for method, options in (("kind", [*shape, *ranks]), ("dense", shape)):
        arguments = [tmp_path / method, "--config", RECIPES / f"{size}-{method}.toml", *options, *tiny]
        plan = run(capsys, "pretrain", *arguments, "--dry-run")
        assert "samples of 150 classes, 4 x 4 (latents, 4 channels)" in plan
        assert re.search(r"time +[\d.e-]+ s a step, about", plan)
        run(capsys, "pretrain", *arguments)
        assert len(losses(tmp_path / method)) == 3
    groups = imagenet_grouping()
    assert DiT.from_pretrained(tmp_path / "kind" / "model").classes.names == groups.split("base")
    parts = tmp_path / "parts"
    run(capsys, "decompose", tmp_path / "kind" / "model", parts)
    runs = [(f"novel-{n}", "transfer", ["--data.split", f"novel-{n}", *tiny]) for n in IMAGENET_TASKS]
    runs.append(("hubble", "shift", [*TINY, "--data.source", small / "hubble-latents"]))
    for name, recipe, options in runs:
        arguments = [
            parts,
            tmp_path / name,
            "--config",
            RECIPES / f"{size}-{recipe}.toml",
            "--rank",
            8,
            *options,
        ]
        assert "s a step" in run(capsys, "transfer", *arguments, "--dry-run")
        run(capsys, "transfer", *arguments)
        model = DiT.from_pretrained(tmp_path / name / "model")
        assert model.structure["slots"] == 1
        wanted = groups.split(name) if recipe == "transfer" else ("galaxy", "nebula")
        assert model.classes.names == wanted
        assert all(layer.tailor_u.abs().max() > 0 for _, layer in model.named_matrices()), (
            "fresh tailors moved"
        )
        before = load_components(parts, classes=()).learngenes["blocks.1.q.u"]
        assert torch.equal(dict(model.named_parameters())["blocks.1.q.u"], before), "learngenes did not"
    score = json.loads(
        run(
            capsys, "evaluate", tmp_path / "novel-5" / "model", "--config", RECIPES / "evaluate.toml", "--steps", 2,
            "--count", 10, "--reference", small / "train", "--groups", "imagenet", "--split", "novel-5", "--json",
        )
    )  # fmt: skip
    assert score["protocol"]["classes"] == list(groups.split("novel-5"))
    assert score["protocol"]["sampler"] == "ddpm, even"
