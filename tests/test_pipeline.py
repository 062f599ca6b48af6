"""Sampling: an image is a function of (seed, index, class), whatever is drawn beside it."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import NAMES, randomised
from kindiff.classes import ClassSet
from kindiff.components import factorize
from kindiff.config import AutoencoderConfig, DiTConfig, KindConfig, SampleConfig
from kindiff.diffusion import loss_of
from kindiff.errors import BadFileError, UsageError
from kindiff.models import DiT
from kindiff.models.autoencoder import Autoencoder
from kindiff.pipeline import DiTPipeline, to_uint8

IDS = [0, 3, 1, 1, 4, 5, 2]  # mixed classes, one twice, the null class
FLOW = SampleConfig(steps=3, guidance=1.7, seed=11, device="cpu")


def random_model(objective: str, **changes: object) -> DiT:
    """A tiny decomposable model of random weights."""
    config = DiTConfig(
        **{
            "input_size": 8, "channels": 3, "num_classes": 5, "width": 32, "depth": 2, "heads": 2, "patch": 2,
            "objective": objective, **changes,
        }
    )  # fmt: skip
    torch.manual_seed(0)
    dense = randomised(DiT(config, classes=ClassSet(NAMES)))
    return randomised(factorize(dense, KindConfig(learngene_rank=10, tailor_rank=3)), seed=1)


def model_of(objective: str = "flow", **changes: object) -> DiT:
    """A tiny decomposable model that draws pictures with more than the two limits of uint8."""
    model = random_model(objective, **changes)
    if objective == "epsilon":
        model.load_state_dict(settled())
    return model


@functools.cache
def settled() -> dict[str, torch.Tensor]:
    """An epsilon model's weights after some steps on coloured noise: with random weights it draws only 0 and 255."""
    model = random_model("epsilon")
    generator = torch.Generator().manual_seed(3)
    adam, loss = torch.optim.Adam(model.parameters(), lr=4e-3), loss_of(model.config)
    colours = torch.rand(6, 3, 1, 1, generator=generator) - 0.5
    for _ in range(150):
        ids = torch.randint(6, (16,), generator=generator)
        noise, shade = torch.randn(2, 16, 3, 8, 8, generator=generator)
        u_B = torch.rand(16, generator=generator)
        adam.zero_grad()
        value = loss(lambda x, t, ids=ids: model(x, t, ids), colours[ids] + 0.3 * shade, noise, u_B)
        value.mean().backward()
        adam.step()
    return model.state_dict()


def autoencoder(seed: int = 0) -> Autoencoder:
    torch.manual_seed(seed)
    return Autoencoder(AutoencoderConfig(channels=4, width=8)).eval().requires_grad_(False)


@pytest.fixture(params=["heun", "euler", "ddim", "ddpm", "latent"])
def pipeline_and_config(request) -> tuple[DiTPipeline, SampleConfig]:
    if request.param == "latent":
        codec = autoencoder()
        model = model_of(channels=4, input_size=4, autoencoder=codec.fingerprint())
        return DiTPipeline(model, codec), FLOW
    objective = "flow" if request.param in ("heun", "euler") else "epsilon"
    steps = 3 if objective == "flow" else 10
    return DiTPipeline(model_of(objective)), dataclasses.replace(FLOW, sampler=request.param, steps=steps)


def assert_same_pictures(found: np.ndarray, wanted: np.ndarray) -> None:
    """At most one level apart: other batch sizes add float32 numbers in another order."""
    assert found.shape == wanted.shape
    assert int(np.abs(found.astype(int) - wanted.astype(int)).max()) <= 1


def test_a_picture_depends_on_seed_index_and_class_only(pipeline_and_config) -> None:
    pipeline, config = pipeline_and_config
    together = pipeline.sample(IDS, config)
    side = 16 if pipeline.autoencoder is not None else 8
    assert together.shape == (7, side, side, 3)
    assert together.dtype == np.uint8
    assert ((together > 0) & (together < 255)).mean() > 0.25, "pictures at the limits would hide differences"
    assert np.array_equal(pipeline.sample(IDS, config), together), "the same call, the same bits"
    for batch in (1, 2, 5):
        assert_same_pictures(pipeline.sample(IDS, dataclasses.replace(config, batch=batch)), together)
    for i, class_id in enumerate(IDS):
        assert_same_pictures(pipeline.sample([class_id], config, first_index=i), together[i : i + 1])
    neighbours = [2, 2, 1, 5, 4, 0, 0]  # 1 at place 2 and 4 at place 4 stay
    assert_same_pictures(pipeline.sample(neighbours, config)[[2, 4]], together[[2, 4]])


def test_seed_index_and_class_each_matter(pipeline_and_config) -> None:
    pipeline, config = pipeline_and_config
    base = pipeline.sample([1], config)
    others = {
        "seed": pipeline.sample([1], dataclasses.replace(config, seed=12)),
        "index": pipeline.sample([1], config, first_index=1),
        "class": pipeline.sample([2], config),
        "null": pipeline.sample([5], config),
        "guidance": pipeline.sample([1], dataclasses.replace(config, guidance=1.0)),
        "learngenes alone": pipeline.sample([1], config, tailors=False),
    }
    for name, other in others.items():
        assert (np.abs(other.astype(int) - base.astype(int)) > 1).mean() > 0.05, name


def test_guidance_of_the_null_class_changes_nothing() -> None:
    pipeline = DiTPipeline(model_of())
    one, three = (pipeline.sample([5, 5], dataclasses.replace(FLOW, guidance=g)) for g in (1.0, 3.0))
    assert_same_pictures(one, three)


def test_learngenes_alone_keep_the_class_embedding() -> None:
    pipeline = DiTPipeline(model_of())
    config = dataclasses.replace(FLOW, guidance=1.0)
    bare = pipeline.sample([0, 0, 5], config, tailors=False)
    without = model_of()
    for _, layer in without.named_matrices():
        torch.nn.init.zeros_(layer.tailor_u)
    assert_same_pictures(bare, DiTPipeline(without).sample([0, 0, 5], config))
    assert not np.array_equal(bare[0], pipeline.sample([5], config, tailors=False)[0])


def test_a_tailor_that_stays_on_without_a_label_is_on_in_the_null_pass() -> None:
    model = model_of()
    pipeline = DiTPipeline(model)
    usual = pipeline.sample([1, 2], FLOW)
    model.config = dataclasses.replace(model.config, null_gate="class")
    kept = pipeline.sample([1, 2], FLOW)
    assert (np.abs(usual.astype(int) - kept.astype(int)) > 1).mean() > 0.05
    # One class: the same as a model whose gate has that tailor on for the null class too.
    model.config = dataclasses.replace(model.config, null_gate="off")
    for table in (model.gate.slots_CK, model.gate.weights_CK):
        table[-1] = table[1]
    assert_same_pictures(pipeline.sample([1], FLOW), kept[:1])


def test_progress_and_empty_requests() -> None:
    pipeline, told = DiTPipeline(model_of()), []
    pipeline.sample(IDS, dataclasses.replace(FLOW, batch=3), advance=told.append)
    assert told == [3, 3, 1]
    assert pipeline.sample([], FLOW).shape[0] == 0


@pytest.mark.parametrize("objective", ["flow", "epsilon"])
@pytest.mark.parametrize("sampler", ["euler", "heun", "ddim", "ddpm"])
def test_a_sampler_that_does_not_fit_is_refused(objective, sampler) -> None:
    pipeline = DiTPipeline(model_of(objective))
    config = dataclasses.replace(FLOW, sampler=sampler)
    if (objective == "flow") == (sampler in ("euler", "heun")):
        assert len(pipeline.sample([0], config)) == 1
        return
    with pytest.raises(UsageError, match=f"'{sampler}' does not fit a {objective} model; use "):
        pipeline.sample([0], config)


@pytest.mark.parametrize("bad", [-1, 6, 1000])
def test_an_unknown_id_is_an_error_and_never_the_base_model(bad) -> None:
    with pytest.raises(UsageError, match=rf"class id {bad} is not in the model; it has ids 0 to 5"):
        DiTPipeline(model_of()).sample([0, bad], FLOW)


def test_the_wrong_autoencoder_is_refused(tmp_path: Path) -> None:
    codec = autoencoder()
    latent = model_of(channels=4, input_size=4, autoencoder=codec.fingerprint())
    with pytest.raises(UsageError, match="not the one whose latents"):
        DiTPipeline(latent, autoencoder(seed=1))
    with pytest.raises(UsageError, match="needs its autoencoder"):
        DiTPipeline(latent)
    with pytest.raises(UsageError, match="works on pixels"):
        DiTPipeline(model_of(), codec)
    DiTPipeline(latent, codec).save_pretrained(tmp_path / "model")
    autoencoder(seed=1).save_pretrained(tmp_path / "model" / "autoencoder")
    with pytest.raises(UsageError, match="not the one whose latents"):
        DiTPipeline.from_pretrained(tmp_path / "model")


def test_saved_and_loaded_draws_the_same_bits(pipeline_and_config, tmp_path: Path) -> None:
    pipeline, config = pipeline_and_config
    pipeline.save_pretrained(tmp_path / "model")
    again = DiTPipeline.from_pretrained(tmp_path / "model")
    for name, tensor in pipeline.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name]), name
    assert (again.autoencoder is None) == (pipeline.autoencoder is None)
    assert np.array_equal(again.sample(IDS, config), pipeline.sample(IDS, config))


def test_a_model_without_its_autoencoder_files_is_named(tmp_path: Path) -> None:
    codec = autoencoder()
    latent = model_of(channels=4, input_size=4, autoencoder=codec.fingerprint())
    DiTPipeline(latent, codec).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "autoencoder" / "config.json").unlink()
    with pytest.raises((FileNotFoundError, BadFileError), match="autoencoder"):
        DiTPipeline.from_pretrained(tmp_path / "model")


def test_to_uint8_rounds_and_clamps() -> None:
    x = torch.tensor([-2.0, -1.0, -1 + 1.4 / 127.5, -1 + 1.6 / 127.5, 0.0, 1.0, 3.0]).view(1, 1, 7, 1)
    assert to_uint8(x).flatten().tolist() == [0, 0, 1, 2, 128, 255, 255]
