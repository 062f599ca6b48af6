"""Pre-training that starts from a checkpoint: dense, converted, or made of components."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kindiff.classes import ClassSet
from kindiff.components import decompose, factorize, save_components
from kindiff.config import (
    BackboneConfig,
    DataConfig,
    DiTConfig,
    KindConfig,
    ObjectiveConfig,
    PretrainConfig,
    TrainConfig,
)
from kindiff.errors import UsageError
from kindiff.models import DiT
from kindiff.parallel import Ranks
from kindiff.train import pretrain
from kindiff.train.starting import init_hash, starting_model
from random_models import noisy_dit
from toys import write_shapes

NAMES = ("disc", "bars", "chess", "ramp")
SHAPE = DiTConfig(input_size=16, channels=3, num_classes=4, width=32, depth=2, heads=2, patch=4)
KIND = KindConfig(learngene_rank=12, tailor_rank=2)


@pytest.fixture
def config() -> PretrainConfig:
    return PretrainConfig(
        model=BackboneConfig(width=32, depth=2, heads=2, patch=4),
        kind=KIND,
        objective=ObjectiveConfig(),
        train=TrainConfig(steps=2, batch=4, warmup=1, device="cpu", precision="fp32"),
    )


def outputs(model: DiT, ids: list[int]) -> torch.Tensor:
    x = torch.randn(len(ids), 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model.eval()(x, torch.linspace(0, 999, len(ids)), torch.tensor(ids))


def test_a_dense_checkpoint_is_factorised(config: PretrainConfig, tmp_path: Path) -> None:
    dense = noisy_dit(SHAPE, NAMES)
    dense.save_pretrained(tmp_path / "dense")
    full = replace(config, init=str(tmp_path / "dense"), kind=KindConfig(learngene_rank=32, tailor_rank=2))
    started = starting_model(full, SHAPE, ClassSet(NAMES))
    ids = [0, 1, 2, 3, 4]
    torch.testing.assert_close(outputs(started, ids), outputs(dense, ids), rtol=0, atol=1e-4)
    plain = starting_model(replace(config, method="dense", init=full.init), SHAPE, ClassSet(NAMES))
    assert torch.equal(outputs(plain, ids), outputs(dense, ids))


def test_classes_are_matched_by_name_or_by_number(config: PretrainConfig, tmp_path: Path) -> None:
    dense = noisy_dit(SHAPE, NAMES)
    dense.save_pretrained(tmp_path / "dense")
    noisy_dit(SHAPE).save_pretrained(tmp_path / "numbered")
    some = replace(config, method="dense", init=str(tmp_path / "dense"))
    picked = starting_model(some, replace(SHAPE, num_classes=2), ClassSet(("ramp", "disc")))
    assert torch.equal(outputs(picked, [0, 1, 2]), outputs(dense, [3, 0, 4]))
    numbered = replace(some, init=str(tmp_path / "numbered"))
    named = starting_model(numbered, SHAPE, ClassSet(NAMES))
    assert named.classes.names == NAMES
    assert torch.equal(outputs(named, [0, 4]), outputs(noisy_dit(SHAPE), [0, 4]))
    with pytest.raises(UsageError, match="has 4 classes without names and the data 2"):
        starting_model(numbered, replace(SHAPE, num_classes=2), ClassSet(("disc", "ramp")))
    with pytest.raises(UsageError, match=r"lacks the class 'discs' \(did you mean 'disc'\?\)"):
        starting_model(some, replace(SHAPE, num_classes=2), ClassSet(("discs", "ramp")))


def test_components_are_taken_as_they_are(config: PretrainConfig, tmp_path: Path) -> None:
    noisy_dit(SHAPE, NAMES).save_pretrained(tmp_path / "dense")
    first = starting_model(replace(config, init=str(tmp_path / "dense")), SHAPE, ClassSet(NAMES))
    first.save_pretrained(tmp_path / "kind")
    save_components(decompose(first), tmp_path / "parts")
    for folder in ("kind", "parts"):
        started = starting_model(replace(config, init=str(tmp_path / folder)), SHAPE, ClassSet(NAMES))
        assert all(torch.equal(a, started.state_dict()[n]) for n, a in first.state_dict().items())
        two = starting_model(
            replace(config, init=str(tmp_path / folder)), replace(SHAPE, num_classes=2), ClassSet(NAMES[:2])
        )
        assert torch.equal(outputs(two, [0, 1]), outputs(first, [0, 1]))
        latent = replace(SHAPE, num_classes=2, autoencoder="of the data")
        start = replace(config, init=str(tmp_path / folder))
        assert starting_model(start, latent, ClassSet(NAMES[:2])).config == latent
    again = replace(config, init=str(tmp_path / "kind"))
    for change, sentence in (
        (
            {"kind": KindConfig(learngene_rank=13, tailor_rank=2)},
            "has learngene_rank 12 and kind.learngene_rank is 13",
        ),
        ({"kind": KindConfig(learngene_rank=12, tailor_rank=2, gate="soft")}, "has gate 'class'"),
        ({"method": "dense"}, "is made of components and method is dense"),
    ):
        with pytest.raises(UsageError, match=sentence):
            starting_model(replace(again, **change), SHAPE, ClassSet(NAMES))


def test_shapes_that_do_not_fit_are_named(config: PretrainConfig, tmp_path: Path) -> None:
    noisy_dit(SHAPE, NAMES).save_pretrained(tmp_path / "dense")
    start = replace(config, init=str(tmp_path / "dense"))
    with pytest.raises(UsageError, match="has width 32, this run 64"):
        starting_model(start, replace(SHAPE, width=64), ClassSet(NAMES))
    with pytest.raises(UsageError, match="has objective 'flow', this run 'epsilon'"):
        starting_model(start, replace(SHAPE, objective="epsilon"), ClassSet(NAMES))
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        starting_model(replace(config, init=str(tmp_path)), SHAPE, ClassSet(NAMES))
    with pytest.raises(FileNotFoundError, match=r"holds no model\.safetensors"):
        init_hash(replace(config, init=str(tmp_path)))


def test_a_diffusers_models_norm_can_be_asked_for() -> None:
    data = {"input_size": 16, "channels": 3, "num_classes": 3, "objective": "flow"}
    assert BackboneConfig(mlp_norm_eps=1e-5).build(**data).mlp_norm_eps == 1e-5


def test_controls_that_a_gate_would_not_heed_are_refused() -> None:
    soft = KindConfig(learngene_rank=8, tailor_rank=2, gate="soft")
    for settings, sentence in (
        ({"kind": soft, "objective": ObjectiveConfig(gate_labels="shuffled")}, "gate_labels shuffled needs"),
        (
            {"method": "dense", "objective": ObjectiveConfig(gate_labels="shuffled")},
            "gate_labels shuffled needs",
        ),
        ({"kind": soft, "objective": ObjectiveConfig(null_gate="class")}, "null_gate class needs"),
    ):
        with pytest.raises(UsageError, match=sentence):
            PretrainConfig(**settings)


def test_a_batch_that_does_not_divide_leaves_no_run_behind(
    config: PretrainConfig, tmp_path: Path, monkeypatch
) -> None:
    data = DataConfig(source=str(write_shapes(tmp_path / "shapes")), size=16)
    odd = replace(config, data=data, train=replace(config.train, batch=9))
    monkeypatch.setattr("kindiff.train.pretraining.joined", lambda: nullcontext(Ranks(rank=0, count=2)))
    monkeypatch.setattr(Ranks, "in_turn", lambda self, work: work())
    with pytest.raises(
        UsageError, match="does not divide among 2 ranks and 1 parts; make it a multiple of 2"
    ):
        pretrain(odd, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_starts_from_a_checkpoint_and_knows_which(config: PretrainConfig, tmp_path: Path) -> None:
    noisy_dit(SHAPE, NAMES).save_pretrained(tmp_path / "dense")
    data = DataConfig(source=str(write_shapes(tmp_path / "shapes")), size=16)
    start = replace(config, data=data, init=str(tmp_path / "dense"))
    pipeline = pretrain(start, tmp_path / "run")
    assert pipeline.model.structure["rank"] == 12
    noisy_dit(SHAPE, NAMES, seed=5).save_pretrained(tmp_path / "dense")
    with pytest.raises(UsageError, match="init was"):
        pretrain(start, tmp_path / "run")


def test_superclasses_come_from_a_file(tmp_path: Path, config: PretrainConfig) -> None:
    groups = '{"format": 1, "kind": "groups", "splits": {}, "groups": ['
    members = (("round", ["disc"]), ("straight", ["bars", "chess", "ramp"]))
    listed = (
        f'{{"name": "{name}", "node": "{name}", "similarity": 0, "classes": {str(own).replace(chr(39), chr(34))}}}'
        for name, own in members
    )
    (tmp_path / "groups.json").write_text(groups + ", ".join(listed) + "]}")
    kind = KindConfig(learngene_rank=12, tailor_rank=2, gate="superclass")
    start = replace(config, kind=kind, superclasses=str(tmp_path / "groups.json"))
    model = starting_model(start, SHAPE, ClassSet(NAMES))
    assert model.gate.slots_CK[:-1].tolist() == [[0, 4], [1, 5], [2, 5], [3, 5]]
    with pytest.raises(UsageError, match="no group holds the class yak"):
        starting_model(start, replace(SHAPE, num_classes=1), ClassSet(("yak",)))


def test_auto_is_the_measured_start_for_random_weights_and_svd_for_a_dense_model() -> None:
    dense = DiT(SHAPE, classes=ClassSet(NAMES))

    def start(init: str) -> dict[str, torch.Tensor]:
        kind = KindConfig(learngene_rank=6, tailor_rank=1, init=init)
        return starting_model(PretrainConfig(kind=kind), SHAPE, dense.classes).state_dict()

    auto, rescaled, plain = start("auto"), start("svd-rescaled"), start("svd")
    assert all(torch.equal(auto[name], rescaled[name]) for name in auto)
    assert not torch.equal(auto["blocks.0.q.sigma"], plain["blocks.0.q.sigma"])
    kind = KindConfig(learngene_rank=6, tailor_rank=1)
    by_default = factorize(dense, kind).state_dict()
    as_svd = factorize(dense, replace(kind, init="svd")).state_dict()
    assert all(torch.equal(by_default[name], as_svd[name]) for name in by_default)
