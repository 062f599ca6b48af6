"""Dry runs: the figures of the plan are the model's own, and what is missing is said."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kindiff.cli.main import main
from kindiff.components import decompose, factorize, mixture, save_components
from kindiff.config import (
    BackboneConfig,
    DataConfig,
    DiTConfig,
    KindConfig,
    ObjectiveConfig,
    PretrainConfig,
    TrainConfig,
    TransferConfig,
)
from kindiff.data import open_samples
from kindiff.diffusion import loss_of
from kindiff.errors import UsageError
from kindiff.evaluate.cost import counted_macs
from kindiff.models import DiT
from kindiff.train.memory import activations, memory
from kindiff.train.optimiser import Optimiser
from kindiff.train.plan import expected, outline, pretrain_plan, transfer_plan
from kindiff.train.pretraining import new_model
from random_models import noisy_dit
from toys import NEW_SHAPES, SHAPES, SIZE, toy, write_shapes

CPU = torch.device("cpu")


@pytest.fixture
def shapes(tmp_path: Path) -> Path:
    return write_shapes(tmp_path / "shapes")


@pytest.mark.parametrize("method", ["tleg", "fine", "wave"])
def test_the_plan_of_a_constrained_model_is_its_own(shapes: Path, method: str) -> None:
    config = toy(shapes, method=method)
    config = replace(config, kind=replace(config.kind, learngene_rank=999))  # nothing to it
    plan, model = pretrain_plan(config), new_model(config, open_samples(config.data))
    assert plan.trainable == sum(p.numel() for p in model.parameters())
    assert plan.parameters == sum(p.numel() for p in DiT(model.config).parameters())
    assert plan.macs == plan.dense_macs
    assert " s a step" in plan.time


@pytest.mark.parametrize("method", ["kind", "dense"])
def test_the_plan_counts_the_model_that_trains(shapes: Path, method: str) -> None:
    config = toy(shapes, method=method)
    plan = pretrain_plan(config)
    model = new_model(config, open_samples(config.data))
    count = sum(p.numel() for p in model.parameters())
    assert (plan.parameters, plan.trainable) == (count, count)
    assert plan.macs == counted_macs(model)
    assert plan.dense_macs == counted_macs(DiT(model.config))
    banks = sum(p.numel() for n, p in model.named_parameters() if ".tailor_" in n)
    assert plan.memory["weights"] == plan.memory["average"] == 4 * count
    assert plan.memory["gradients"] == 4 * (
        count + banks
    )  # 4 images may have all 4 classes: their rows and gradients
    assert plan.memory["optimiser"] == 8 * count
    assert outline(config, expected(config.data)).state_dict().keys() == model.state_dict().keys()
    found = re.search(r"([\d.e-]+) s a step, about .* \(median of 3 steps of 4 images on cpu", plan.time)
    assert found, plan.time
    assert 0 < float(found.group(1)) < 60
    assert "24 samples of 4 classes" in plan.text()


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("kind", [None, (16, 2), (90, 20), (60, 0)])
@pytest.mark.parametrize(("width", "side"), [(128, 8), (192, 16)])
def test_activations_are_what_autograd_keeps(precision, kind, width, side, kernels) -> None:
    """The formula against the tensors that a real backward pass holds on to."""
    model = backbone(width, side, classes=4)
    if kind is not None:
        model = factorize(model, KindConfig(learngene_rank=kind[0], tailor_rank=kind[1], init="per-factor"))
    assert activations(model, precision, 3, CPU) == pytest.approx(counted(model, precision), rel=0.06)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize(("known", "mixes"), [(4, 2), (12, 2), (12, 6)])
def test_a_mixture_keeps_less_than_the_formula_says(precision, known, mixes, kernels) -> None:
    kind = KindConfig(learngene_rank=90, tailor_rank=20, init="per-factor")
    parts = decompose(factorize(backbone(128, 8, classes=known), kind))
    new = {f"new{i}": [parts.classes[(i + k) % known] for k in range(mixes)] for i in range(4)}
    model = mixture(parts, new).train()
    assert 1.25 < activations(model, precision, 3, CPU) / counted(model, precision) < 2.5


def backbone(width: int, side: int, classes: int) -> DiT:
    shape = DiTConfig(
        input_size=2 * side, channels=4, num_classes=classes, width=width, depth=4, heads=4, patch=2
    )
    return noisy_dit(shape).train()


def counted(model: DiT, precision: str) -> int:
    """Bytes of the tensors that autograd keeps for the backward pass of three images, parameters (of banks a step's
    rows) not among them."""
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    config = model.config
    x, noise = torch.randn(2, 3, config.channels, config.input_size, config.input_size)
    ids = torch.tensor([0, 1, 3])
    with (
        Optimiser(model, TrainConfig()).of_slots(ids),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"),
    ):
        loss = loss_of(config)(lambda x, t: model(x, t, ids), x, noise, torch.rand(3))
        for parameter in model.parameters():
            kept.pop(parameter.untyped_storage().data_ptr(), None)
    assert loss.shape == (3,)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("share", ["task", "both", "mixture"])
def test_what_trains_is_counted_apart(shapes: Path, tmp_path: Path, share) -> None:
    model = new_model(toy(shapes), open_samples(DataConfig(source=str(shapes), size=SIZE)))
    save_components(decompose(model), tmp_path / "parts")
    write_shapes(tmp_path / "new", NEW_SHAPES)
    config = TransferConfig(
        data=DataConfig(source=str(tmp_path / "new"), size=SIZE), rank=3, train_also=("bias",),
        train=TrainConfig(steps=10, batch=4),
        **({"share": share} if share != "mixture" else {"init": "nearest", "trains": "mixture", "mixes": 2}),
    )  # fmt: skip
    plan = transfer_plan(tmp_path / "parts", config)
    parts = decompose(model)
    if share == "mixture":
        trains = mixture(parts, dict.fromkeys(NEW_SHAPES, SHAPES[:2]), train_also=("bias",))
        becomes = decompose(trains).recombine(tailor_rank=3, layers="factored")
    else:
        trains = becomes = parts.with_new_tailors(NEW_SHAPES, rank=3, share=share, train_also=("bias",))
    trained = sum(p.numel() for p in trains.parameters() if p.requires_grad)
    assert (plan.trainable, plan.parameters) == (trained, sum(p.numel() for p in becomes.parameters()))
    assert plan.macs == counted_macs(becomes)
    assert plan.memory["optimiser"] == 8 * trained
    assert "s a step" in plan.time
    # the same figures from the recipe alone, where there are no parts and no data yet
    recipe = tmp_path / "kind.toml"
    recipe.write_text(
        '[data]\nsource = "nowhere"\nsize = 16\nclasses = ["a", "b", "c", "d"]\n[model]\nwidth = 32\ndepth = 2\n'
        "heads = 2\npatch = 4\n[kind]\nlearngene_rank = 8\ntailor_rank = 2\n"
    )
    missing = dataclasses.replace(
        config, data=dataclasses.replace(config.data, source="gone", classes=NEW_SHAPES)
    )
    early = transfer_plan(recipe, missing)
    assert (early.trainable, early.parameters, early.macs) == (plan.trainable, plan.parameters, plan.macs)
    assert early.time == "not measured: the data are missing"
    assert "missing (image folder" in early.data
    assert transfer_plan(recipe, config).time == "not measured: the parts are missing"


def test_what_does_not_fit_is_refused_before_the_run(shapes: Path, tmp_path: Path, capsys) -> None:
    config = toy(shapes)
    for kind, named in (
        (KindConfig(learngene_rank=33, tailor_rank=2), "learngene rank 33 is larger than the full rank 32"),
        (KindConfig(learngene_rank=8, tailor_rank=33), "tailor rank 33 is larger"),
        (KindConfig(learngene_rank=8, tailor_rank=2, gate="superclass"), "superclass"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=named):
            pretrain_plan(dataclasses.replace(config, kind=kind))
    recipe = tmp_path / "dense.toml"
    recipe.write_text('method = "dense"\n')
    with pytest.raises(UsageError, match="trains a dense model"):
        transfer_plan(recipe, TransferConfig())
    assert main(["transfer", str(tmp_path / "none"), str(tmp_path / "run"), "--dry-run"]) == 1
    assert "config.json" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_model_that_does_not_fit_the_memory_is_not_measured(shapes: Path) -> None:
    config = PretrainConfig(
        data=DataConfig(source=str(shapes), size=SIZE),
        model=BackboneConfig(width=8192, depth=200, heads=8, patch=4),
        kind=KindConfig(learngene_rank=2048, tailor_rank=8),
        objective=ObjectiveConfig(kind="epsilon"),
    )
    plan = pretrain_plan(config)
    assert re.match(r"not measured: a step needs about [\d.]+ GiB and [\d.]+ GiB are free on cpu", plan.time)
    assert sum(plan.memory.values()) > 1e12
    small = outline(toy(shapes), expected(config.data))
    needs = memory(small, TrainConfig(), 8, CPU)
    assert needs["activations"] > memory(small, TrainConfig(), 4, CPU)["activations"]
    deep = outline(
        replace(toy(shapes), model=BackboneConfig(width=64, depth=8, heads=2, patch=4)), expected(config.data)
    )
    assert activations(deep, "fp32", 8, CPU, recompute=True) < activations(deep, "fp32", 8, CPU) / 4


def test_a_plan_is_of_the_images_that_one_process_has_at_once(shapes: Path, monkeypatch) -> None:
    config = replace(toy(shapes), train=TrainConfig(steps=4, batch=24, accumulate=3))
    assert pretrain_plan(config).images == 8
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert pretrain_plan(config).images == 4
