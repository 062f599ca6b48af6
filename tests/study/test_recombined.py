"""Smaller models of a base's own classes: recombined, cut, without tailors, trained on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kindiff.components import decompose, save_components
from kindiff.config import AutoencoderConfig, DataConfig, EncodeConfig, SampleConfig, TrainConfig
from kindiff.models import DiT
from kindiff.pipeline import DiTPipeline
from kindiff.study.cells import Bench
from kindiff.study.config import RecombineConfig, Study
from kindiff.study.recombined import cut, smaller
from kindiff.train import pretrain
from kindiff.train.encoding import encode
from toys import toy, write_shapes


@pytest.fixture(scope="module", params=["kind", "dense"])
def base(request, tmp_path_factory):
    place = tmp_path_factory.mktemp(request.param)
    recipe = toy(write_shapes(place / "shapes"), method=request.param)
    trained = pretrain(recipe, place / "base")
    if request.param == "kind":
        save_components(decompose(trained.model), place / "base" / "parts")
    return recipe, place / "base", trained.model


def output(model: DiT) -> torch.Tensor:
    x = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.eval()(x, torch.tensor([10.0, 500.0, 900.0]), torch.tensor([0, 1, 3]))


def test_a_base_as_it_is_and_smaller(base, tmp_path) -> None:
    recipe, folder, whole = base
    same = smaller(recipe, folder, RecombineConfig(), tmp_path / "same")
    assert same == recipe
    torch.testing.assert_close(output(DiT.from_pretrained(tmp_path / "same" / "model")), output(whole))
    wanted = RecombineConfig(learngene_rank=4, tailor_rank=1 if recipe.method == "kind" else 0)
    smaller(recipe, folder, wanted, tmp_path / "small")
    small = DiT.from_pretrained(tmp_path / "small" / "model")
    assert small.structure is not None
    assert (small.structure["rank"], small.structure["tailor_rank"]) == (4, wanted.tailor_rank)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in whole.parameters())


def test_the_learngenes_alone_have_no_tailor(base, tmp_path) -> None:
    recipe, folder, whole = base
    if recipe.method == "dense":
        pytest.skip("a dense base has no tailors")
    smaller(recipe, folder, RecombineConfig(tailors=False), tmp_path / "bare")
    bare = DiT.from_pretrained(tmp_path / "bare" / "model")
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    t, ids, off = torch.tensor([10.0, 500.0]), torch.tensor([0, 1]), torch.tensor([4, 4])
    with torch.no_grad():
        torch.testing.assert_close(bare.eval()(x, t, ids), whole.eval()(x, t, ids, off))
        assert not torch.equal(whole(x, t, ids), whole(x, t, ids, off))


def test_a_smaller_model_is_trained_on(base, tmp_path) -> None:
    recipe, folder, _ = base
    few = replace(recipe, train=TrainConfig(steps=3, batch=4, lr=1e-2))
    tailors = 1 if recipe.method == "kind" else 0
    wanted = RecombineConfig(learngene_rank=4, tailor_rank=tailors, train=True)
    used = smaller(few, folder, wanted, tmp_path / "on")
    assert (used.kind.learngene_rank, used.kind.tailor_rank) == (4, tailors)
    before = DiT.from_pretrained(tmp_path / "on--start")
    after = DiT.from_pretrained(tmp_path / "on" / "model")
    assert before.structure == after.structure
    assert not torch.equal(output(before), output(after))


def test_a_dense_base_that_is_cut_can_be_transferred(base, tmp_path) -> None:
    recipe, folder, whole = base
    if recipe.method == "kind":
        pytest.skip("a decomposable base is not cut")
    parts = decompose(cut(folder, 4).model)
    assert (parts.learngene_rank, parts.tailor_rank) == (4, 0)
    weight = dict(whole.named_matrices())["blocks.0.q"].weight
    u, sigma, v = torch.linalg.svd(weight)
    torch.testing.assert_close(
        dict(parts.recombine(layers="dense").named_matrices())["blocks.0.q"].weight,
        (u[:, :4] * sigma[:4]) @ v[:4],
    )
    taught = parts.with_new_tailors(("ring",), rank=2)
    assert {name.rpartition(".")[2] for name, p in taught.named_parameters() if p.requires_grad} >= {
        "tailor_u"
    }


def test_some_of_the_classes(base, tmp_path) -> None:
    """A dense model keeps their embeddings, a recombined one their tailors too; both draw them as the whole does."""
    recipe, folder, whole = base
    names = whole.classes.names[1:]
    some = replace(recipe, data=replace(recipe.data, classes=names))
    smaller(some, folder, RecombineConfig(), tmp_path / "some")
    model = DiT.from_pretrained(tmp_path / "some" / "model")
    assert model.classes.names == names
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in whole.parameters())
    x, t = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([10.0, 500.0])
    with torch.no_grad():
        ours, its = model.eval()(x, t, torch.tensor([0, 1])), whole.eval()(x, t, torch.tensor([1, 2]))
    torch.testing.assert_close(ours, its)


def test_paths_in_records_are_relative_to_the_working_folder(tmp_path) -> None:
    bench = Bench(study=None, work=tmp_path, features=None, device="cpu")
    values = {
        "config": {"init": str(tmp_path / "sizes" / "cell--start"), "source": "avatars:base"},
        "steps": 3,
    }
    assert bench._portable(values) == {
        "config": {"init": "sizes/cell--start", "source": "avatars:base"}, "steps": 3,
    }  # fmt: skip


@pytest.mark.parametrize("method", ["kind", "dense"])
def test_bases_on_latents_keep_their_autoencoder(tmp_path, method) -> None:
    own = EncodeConfig(
        data=DataConfig(source=str(write_shapes(tmp_path / "shapes")), size=16), steps=2, workers=1,
        model=AutoencoderConfig(width=8), dtype="float32",
    )  # fmt: skip
    latents = encode(own, tmp_path / "latents")
    recipe = toy(latents.path, method=method, steps=1)
    recipe = replace(recipe, model=replace(recipe.model, patch=2))
    study = Study(
        folder=tmp_path, config=None, bases={"base": recipe}, tasks={}, methods={}, name="", results=tmp_path
    )
    Bench(study=study, work=tmp_path, features=None, device="cpu").prepare("base")
    base = tmp_path / "bases" / "base"
    smaller(recipe, base, RecombineConfig(learngene_rank=4), tmp_path / "small")
    drawn = DiTPipeline.from_pretrained(tmp_path / "small" / "model").sample([0], SampleConfig(steps=1))
    assert drawn.shape == (1, 16, 16, 3)
    if method == "dense":
        whole = cut(base, 4)
        save_components(decompose(whole.model), tmp_path / "parts", autoencoder=whole.autoencoder)
