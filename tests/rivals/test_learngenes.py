"""The other learngene methods: blocks that are inherited, and ancestors that are pre-trained under a constraint."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from kindiff import checkpoint
from kindiff.classes import ClassSet
from kindiff.config import (
    AdaptConfig,
    BackboneConfig,
    DataConfig,
    DiTConfig,
    PretrainConfig,
    RivalConfig,
    TrainConfig,
)
from kindiff.data import open_prepared
from kindiff.errors import BadFileError, UsageError
from kindiff.models import DiT
from kindiff.rivals import expand, load_adapter, load_learngene, start
from kindiff.rivals.layers import most_similar_blocks
from kindiff.train import Interrupted, adapt, pretrain
from kindiff.train import loop as train_loop
from random_models import noisy_dit
from toys import NEW_SHAPES, SHAPES, SIZE, assert_same_tensors, files_of, toy, write_shapes

METHODS = ("tleg", "fine", "wave")
MATRICES = ("q", "k", "v", "o", "mlp_in", "mlp_out", "modulation")
CONFIG = DiTConfig(input_size=8, channels=3, num_classes=len(SHAPES), width=32, depth=3, heads=2, patch=4)
NEW = ClassSet(NEW_SHAPES)


def ancestor(place: Path, method: str) -> PretrainConfig:
    config = toy(place / "shapes", method=method, lr=0.02, warmup=1, save_every=5, precision="fp32")
    return dataclasses.replace(config, model=BackboneConfig(width=32, depth=3, heads=2, patch=4))


@pytest.fixture(scope="module")
def toys(tmp_path_factory) -> Path:
    """shapes, new-shapes: sets; tleg, fine, wave, dense: pre-trained runs. Read only."""
    place = tmp_path_factory.mktemp("toys")
    write_shapes(place / "shapes")
    write_shapes(place / "new-shapes", NEW_SHAPES)
    for method in (*METHODS, "dense"):
        pretrain(ancestor(place, method), place / method)
    return place


@pytest.fixture
def interrupted(monkeypatch):
    """Runs a function and stops its training at the given step (over all its stages)."""

    def call(step: int, function) -> None:
        calls: list[int] = []
        real = train_loop.factor_of

        def counting(*arguments):
            calls.append(1)
            if len(calls) == step:
                raise Interrupted(2, "stopped by the test")
            return real(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(train_loop, "factor_of", counting)
            with pytest.raises(Interrupted):
                function()

    return call


def asked(toys: Path, rival: RivalConfig, **train: object) -> AdaptConfig:
    loop = TrainConfig(steps=10, batch=6, lr=0.02, warmup=1, save_every=3, log_every=3)
    return AdaptConfig(
        data=DataConfig(source=str(toys / "new-shapes"), size=SIZE),
        rival=rival,
        train=dataclasses.replace(loop, **train),
    )


def weights(model: DiT, matrix: str) -> torch.Tensor:
    return torch.stack([getattr(block, matrix).weight.detach() for block in model.blocks])


# Ancestors


@pytest.mark.parametrize("method", METHODS)
def test_the_ancestor_keeps_its_constraint(toys: Path, method: str) -> None:
    model = DiT.from_pretrained(toys / method / "model")
    assert model.structure is None
    tensors = checkpoint.read_tensors(toys / method / "learngene" / "learngene.safetensors")
    for matrix in MATRICES:
        found_LOI = weights(model, matrix)
        assert (found_LOI[1] - found_LOI[0]).abs().max() > 1e-3, "the blocks are the same: it did not train"
        if method == "tleg":
            torch.testing.assert_close(
                found_LOI[2] - found_LOI[1], found_LOI[1] - found_LOI[0], rtol=0, atol=1e-6
            )
            bias_LO = torch.stack([getattr(block, matrix).bias for block in model.blocks])
            torch.testing.assert_close(bias_LO[2] - bias_LO[1], bias_LO[1] - bias_LO[0], rtol=0, atol=1e-6)
        for layer, found in enumerate(found_LOI):
            own = {
                k.rpartition(".")[2]: t for k, t in tensors.items() if k.startswith(f"learngene.{matrix}.")
            }
            if method == "tleg":
                wanted = own["base"] + layer / 3 * own["layer"]
            elif method == "fine":
                wanted = own["u_OR"] @ torch.diag(own["sigma_LR"][layer]) @ own["v_RI"]
            else:
                pairs = zip(own["scalers_LNSS"][layer], own["templates_NOI"], strict=True)
                wanted = sum(torch.kron(scaler.contiguous(), template) for scaler, template in pairs)
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_a_constrained_run_resumes_to_the_bit(toys: Path, tmp_path: Path, interrupted, method: str) -> None:
    config, out = ancestor(toys, method), tmp_path / "run"
    interrupted(8, lambda: pretrain(config, out))
    pretrain(config, out)
    for part in ("model", "learngene", "checkpoints"):
        found, wanted = files_of(out / part), files_of(toys / method / part)
        assert {k: v[0] for k, v in found.items()} == {k: v[0] for k, v in wanted.items()}


@pytest.mark.parametrize("method", METHODS)
def test_a_learngene_makes_models_of_any_depth(toys: Path, tmp_path: Path, method: str) -> None:
    own = DiT.from_pretrained(toys / method / "model")
    folder = toys / method / "learngene"
    assert_same_tensors(dict(expand(folder).state_dict()), dict(own.state_dict()))
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    for depth in (2, 5):
        model = expand(folder, depth=depth)
        assert torch.equal(torch.random.get_rng_state(), state)
        assert model.config == dataclasses.replace(own.config, depth=depth)
        model.save_pretrained(tmp_path / f"deep-{depth}")
        assert_same_tensors(
            dict(DiT.from_pretrained(tmp_path / f"deep-{depth}").state_dict()), dict(model.state_dict())
        )
        for matrix in MATRICES:
            old, new = weights(own, matrix), weights(model, matrix)
            if method == "tleg":
                torch.testing.assert_close(new[1] - new[0], (old[1] - old[0]) * 3 / depth, rtol=0, atol=1e-6)
            else:
                torch.testing.assert_close(new[[0, -1]], old[[0, -1]], rtol=0, atol=1e-6)
                if depth == 5:  # every second block is one of the three, those between are halfway
                    torch.testing.assert_close(new[::2], old, rtol=0, atol=1e-6)
                    torch.testing.assert_close(new[1], (old[0] + old[1]) / 2, rtol=0, atol=1e-6)
        with torch.no_grad():
            output = model(torch.ones(2, 3, SIZE, SIZE), torch.tensor([10.0, 900.0]), torch.tensor([0, 4]))
        assert output.isfinite().all()


def test_a_learngene_is_checked(toys: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a learngene of method 'fine'; 'tleg' is wanted"):
        load_learngene(toys / "fine" / "learngene", method="tleg")
    with pytest.raises(UsageError, match="depth is 0; it must be at least 1"):
        expand(toys / "fine" / "learngene", depth=0)
    with pytest.raises(FileNotFoundError, match="no learngene directory"):
        load_learngene(tmp_path)
    with pytest.raises(BadFileError, match="does not describe a learngene"):
        load_learngene(toys / "fine" / "model")
    for name, content in files_of(toys / "fine" / "learngene").items():
        (tmp_path / name).write_bytes(content[0])
    description = checkpoint.read_json(tmp_path / "config.json")
    checkpoint.write_json(tmp_path / "config.json", description | {"weights": "0" * 64})
    with pytest.raises(BadFileError, match="its hash is not the recorded one"):
        load_learngene(tmp_path)
    checkpoint.write_json(tmp_path / "config.json", description | {"method": "wave"})
    with pytest.raises(BadFileError, match="of another architecture"):
        load_learngene(tmp_path)
    checkpoint.write_json(tmp_path / "config.json", description | {"classes": ["disc"]})
    with pytest.raises(BadFileError, match="is damaged"):
        load_learngene(tmp_path)


def test_constraints_start_from_random_weights(toys: Path) -> None:
    with pytest.raises(UsageError, match="method fine starts from random weights"):
        dataclasses.replace(ancestor(toys, "fine"), init="somewhere")


# Transfer


@pytest.mark.parametrize("method", METHODS)
def test_a_descendant_stands_on_its_own_ancestor(toys: Path, tmp_path: Path, method: str) -> None:
    settings = {"sigma_share": 0.0} if method == "fine" else {}
    config = asked(toys, RivalConfig(method=method, **settings))
    with pytest.raises(FileNotFoundError, match="no learngene directory"):
        adapt(toys / "dense" / "model", config, tmp_path / "run")
    other = METHODS[METHODS.index(method) - 1]
    with pytest.raises(UsageError, match=f"a learngene of method '{other}'"):
        adapt(toys / other / "model", config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    # From there on it is full fine-tuning.
    found = adapt(toys / method / "model", config, tmp_path / "run")
    wanted = adapt(toys / method / "model", asked(toys, RivalConfig(method="full")), tmp_path / "full")
    assert_same_tensors(dict(found.model.state_dict()), dict(wanted.model.state_dict()))


def test_fine_trains_sigma_first(toys: Path, tmp_path: Path, interrupted) -> None:
    config = asked(toys, RivalConfig(method="fine", sigma_share=0.4))
    base, out = toys / "fine" / "model", tmp_path / "run"
    found = adapt(base, config, out)
    before = checkpoint.read_tensors(toys / "fine" / "learngene" / "learngene.safetensors")
    after = checkpoint.read_tensors(out / "sigma" / "checkpoints" / "step-00000004" / "model.safetensors")
    moved = {k for k, t in after.items() if k != "class_embed.weight" and not torch.equal(t, before[k])}
    assert moved == {f"learngene.{matrix}.sigma_LR" for matrix in MATRICES}
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["step-00000006"]
    first = checkpoint.read_tensors(out / "checkpoints" / "step-00000006" / "model.safetensors")
    assert not torch.equal(first["final.out.weight"], before["final.out.weight"])
    again = load_adapter(DiT.from_pretrained(base), out / "adapter")
    assert_same_tensors(dict(again.state_dict()), dict(found.model.state_dict()))
    for step in (3, 7):
        parted = tmp_path / f"parted-{step}"
        interrupted(step, lambda parted=parted: adapt(base, config, parted))
        resumed = adapt(base, config, parted)
        assert_same_tensors(dict(resumed.model.state_dict()), dict(found.model.state_dict()))


def test_heur_lg_inherits_the_last_blocks() -> None:
    base = noisy_dit(CONFIG, SHAPES)
    model = start(base, NEW, RivalConfig(method="heur-lg", inherit=2), seed=0)
    for i in (1, 2):
        assert_same_tensors(dict(model.blocks[i].state_dict()), dict(base.blocks[i].state_dict()))
    assert not model.blocks[0].modulation.weight.any(), "a random block starts as the identity"
    for name, tensor in base.state_dict().items():
        if not name.startswith(("blocks.", "class_embed.")):
            assert torch.equal(model.state_dict()[name], tensor), name
    with pytest.raises(UsageError, match="4 blocks are to be inherited or counted and the base has 3"):
        start(base, NEW, RivalConfig(method="heur-lg", inherit=4), seed=0)


def test_auto_lg_inherits_the_blocks_that_are_named() -> None:
    base = noisy_dit(CONFIG, SHAPES)
    model = start(base, NEW, RivalConfig(method="auto-lg", blocks=(0, 2)), seed=0)
    kept = [torch.equal(a.q.weight, b.q.weight) for a, b in zip(model.blocks, base.blocks, strict=True)]
    assert kept == [True, False, True]
    with pytest.raises(UsageError, match="chooses its blocks on the data"):
        start(base, NEW, RivalConfig(method="auto-lg"), seed=0)
    with pytest.raises(UsageError, match="the base has 3"):
        start(base, NEW, RivalConfig(method="auto-lg", blocks=(3,)), seed=0)


def test_the_most_similar_block_is_found(toys: Path) -> None:
    """A descendant whose only block is one of the base's, where it sees the same tokens."""
    base = noisy_dit(dataclasses.replace(CONFIG, input_size=SIZE), SHAPES)
    samples = open_prepared(toys / "shapes")
    x = torch.from_numpy(samples.fetch(np.arange(12), np.zeros(12, bool)))
    noise, u = (
        torch.randn(x.shape, generator=torch.Generator().manual_seed(0)),
        torch.linspace(0.05, 0.95, 12),
    )
    for place in (0, 1, 2):
        seen = copy.deepcopy(base)
        with torch.no_grad():
            for block in seen.blocks[:place]:
                for parameter in block.modulation.parameters():
                    parameter.zero_()
        descendant = copy.deepcopy(seen)
        descendant.blocks = torch.nn.ModuleList([descendant.blocks[place]])
        assert most_similar_blocks(seen, descendant, x, noise, u, count=1) == (place,)
        assert place in most_similar_blocks(seen, descendant, x, noise, u, count=2)
        assert not seen.blocks[0]._forward_hooks


def test_auto_lg_chooses_on_the_data_and_resumes(toys: Path, tmp_path: Path, interrupted) -> None:
    config = asked(toys, RivalConfig(method="auto-lg", inherit=2))
    base = toys / "dense" / "model"
    found = adapt(base, config, tmp_path / "run")
    description = checkpoint.read_json(tmp_path / "run" / "adapter" / "config.json")
    blocks = tuple(description["rival"]["blocks"])
    assert len(set(blocks)) == 2
    named = adapt(base, asked(toys, RivalConfig(method="auto-lg", blocks=blocks)), tmp_path / "named")
    assert_same_tensors(dict(named.model.state_dict()), dict(found.model.state_dict()))
    for step in (2, 6):  # two steps of the pseudo-descendant, then the run's own
        parted = tmp_path / f"parted-{step}"
        interrupted(step, lambda parted=parted: adapt(base, config, parted))
        resumed = adapt(base, config, parted)
        assert_same_tensors(dict(resumed.model.state_dict()), dict(found.model.state_dict()))
    too_many = asked(toys, RivalConfig(method="auto-lg", inherit=4))
    with pytest.raises(UsageError, match="the base has 3"):
        adapt(base, too_many, tmp_path / "none")
    assert not (tmp_path / "none").exists()
