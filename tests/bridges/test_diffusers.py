"""Against the real diffusers: its DiT, its pipeline."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from kindiff.bridges.diffusers_dit import (
    fitted_time_weight,
    from_diffusers,
    load_diffusers,
    save_diffusers,
    to_diffusers,
)
from kindiff.bridges.diffusers_pipeline import (
    export_classes,
    export_pipeline,
    flow_grid,
    guidance_gap,
    pipeline_timesteps,
)
from kindiff.bridges.released import from_released, save_released, to_released
from kindiff.classes import ClassSet
from kindiff.cli.main import main
from kindiff.components import Components, decompose, factorize, save_components
from kindiff.config import DiTConfig, KindConfig, SampleConfig
from kindiff.diffusion import gaussian, samplers
from kindiff.diffusion.guidance import guided
from kindiff.errors import BadFileError, UsageError
from kindiff.models import DiT
from kindiff.pipeline import DiTPipeline, to_uint8
from kindiff.randomness import Purpose, stream
from random_models import noisy, noisy_dit

NAMES = ("ant", "bee", "cat")
CLOSE = {"rtol": 0.0, "atol": 1e-5}


def small(**changes) -> DiTConfig:
    values = {"objective": "epsilon", "time_features": "diffusers"} | changes
    return DiTConfig(input_size=8, channels=4, num_classes=3, width=32, depth=3, heads=4, patch=2, **values)


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    return x, torch.tensor([0, 1, 250, 731, 999]), torch.tensor([0, 1, 2, 3, 0])


def parts_of(config: DiTConfig) -> Components:
    dense = noisy_dit(config, NAMES)
    return decompose(noisy(factorize(dense, KindConfig(learngene_rank=20, tailor_rank=3)), 1, 0.02))


@pytest.fixture(scope="module")
def diffusers():
    """The library, imported once: it takes some ten seconds."""
    library = pytest.importorskip("diffusers")
    library.logging.set_verbosity_error()
    library.utils.logging.disable_progress_bar()
    return library


@pytest.fixture(scope="module")
def vae(diffusers, tmp_path_factory) -> Path:
    """A random AutoencoderKL of a small configuration."""
    folder = tmp_path_factory.mktemp("vae") / "vae"
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    diffusers.AutoencoderKL(
        block_out_channels=(8, 16), latent_channels=4, norm_num_groups=4, sample_size=16, **blocks
    ).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("objective", ["epsilon", "flow"])
def test_our_model_written_for_diffusers_computes_the_same(diffusers, tmp_path: Path, objective: str) -> None:
    model, (x, t, y) = noisy_dit(small(objective=objective), NAMES), inputs()
    save_diffusers(model, tmp_path / "dit")
    theirs = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path / "dit").eval()
    with torch.no_grad():
        expected = theirs(x, timestep=t, class_labels=y).sample
        torch.testing.assert_close(model(x, t, y), expected, **CLOSE)
    assert expected.abs().max() > 0.5
    again = load_diffusers(tmp_path / "dit", classes=ClassSet(NAMES))
    assert again.config == model.config
    assert all(torch.equal(a, again.state_dict()[n]) for n, a in model.state_dict().items())


def test_diffusers_own_model_is_read(diffusers, tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = noisy(
        diffusers.DiTTransformer2DModel(
            num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=3,
            sample_size=8, num_embeds_ada_norm=3,
        )
    ).eval()  # fmt: skip
    embedder = theirs.transformer_blocks[0].norm1.emb.state_dict()
    for block in theirs.transformer_blocks:
        block.norm1.emb.load_state_dict(embedder)
    theirs.save_pretrained(tmp_path / "dit")
    model, (x, t, y) = load_diffusers(tmp_path / "dit"), inputs()
    assert model.config.mlp_norm_eps == 1e-5  # diffusers' default
    with torch.no_grad():
        torch.testing.assert_close(model(x, t, y), theirs(x, timestep=t, class_labels=y).sample, **CLOSE)
    save_diffusers(model, tmp_path / "back")
    back = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path / "back")
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, back.state_dict()[name]), name
    theirs.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert (tmp_path / "sharded" / "diffusion_pytorch_model.safetensors.index.json").is_file()
    sharded = load_diffusers(tmp_path / "sharded")
    assert all(torch.equal(a, sharded.state_dict()[n]) for n, a in model.state_dict().items())
    theirs.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    assert torch.equal(load_diffusers(tmp_path / "pickled").final.out.weight, model.final.out.weight)


def test_released_weights_at_the_fitted_timesteps(diffusers, tmp_path: Path) -> None:
    """Published and diffusers' timestep features differ; the fit is exact where the sampler steps."""
    model = from_released(to_released(noisy_dit(small(time_features="published"))), heads=4)
    timesteps = pipeline_timesteps(model.config, 50)
    assert timesteps.tolist() == list(range(19, 1000, 20))
    save_diffusers(model, tmp_path / "fit", timesteps_N=timesteps)
    save_diffusers(model, tmp_path / "copy", time="copy")
    x, _, y = inputs()
    with torch.no_grad():
        for name, bound in (("fit", (0.0, 1e-5)), ("copy", (1e-2, 10.0))):
            theirs = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path / name).eval()
            worst = max(
                float((model(x, t, y) - theirs(x, timestep=t, class_labels=y).sample).abs().max())
                for t in (torch.full((5,), int(step)) for step in timesteps)
            )
            assert bound[0] <= worst < bound[1], name
    copied = load_diffusers(tmp_path / "copy", time_features="published")
    save_released(copied, tmp_path / "back.safetensors")
    assert all(torch.equal(a, to_released(copied)[n]) for n, a in to_released(model).items())
    with pytest.raises(UsageError, match="use 50 steps or fewer"):
        fitted_time_weight(model.time_embed[0].weight, pipeline_timesteps(model.config, 100))
    with pytest.raises(UsageError, match="has diffusers' timestep features"):
        to_released(load_diffusers(tmp_path / "copy"))
    with pytest.raises(UsageError, match="needs the timesteps"):
        to_diffusers(model)


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
@pytest.mark.parametrize("objective", ["epsilon", "flow"])
@pytest.mark.parametrize("features", ["published", "diffusers"])
def test_exported_pipelines_sample_what_we_do(diffusers, vae, tmp_path, objective, features) -> None:
    parts = parts_of(small(objective=objective, time_features=features))
    folders = export_classes(parts, ["bee", "cat"], vae, tmp_path / "pipes")
    pipeline = diffusers.DiTPipeline.from_pretrained(folders[1])
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.labels == {"cat": 0}
    merged = parts.recombine(["cat"], layers="merged")
    for steps, scale in ((50, 1.0), (50, 4.0), (10, 4.0)):
        generator = torch.Generator().manual_seed(3)
        theirs = pipeline(
            class_labels=[0, 7], guidance_scale=scale, num_inference_steps=steps, generator=generator,
            output_type="pt",
        ).images  # fmt: skip
        noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
        with torch.no_grad():
            latents = ours(merged, noise, steps, scale)
            decoded = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
        torch.testing.assert_close((decoded / 2 + 0.5).clamp(0, 1), theirs, rtol=0, atol=1e-4)
        assert theirs.std() > 0.01


def test_our_own_pipeline_takes_the_same_steps() -> None:
    model = noisy_dit(small(), NAMES)
    config = SampleConfig(sampler="ddim", spacing="trailing", steps=10, guidance=4.0, device="cpu")
    drawn = DiTPipeline(model).sample([2], config)
    noise = torch.from_numpy(stream(0, Purpose.IMAGE, 0).standard_normal((1, 4, 8, 8), dtype=np.float32))
    few = gaussian.respaced(gaussian.schedule("linear"), 10, spacing="trailing")
    predict = guided(model, torch.tensor([2]), null_id=3, scale=4.0, channels=4)
    with torch.no_grad():
        assert np.array_equal(drawn, to_uint8(samplers.ddim(predict, noise, schedule=few)))


def ours(model: DiT, noise: torch.Tensor, steps: int, scale: float) -> torch.Tensor:
    """Latents by our samplers on the grid of the exported scheduler."""
    ids = torch.zeros(len(noise), dtype=torch.int64)
    predict = guided(model, ids, null_id=1, scale=scale, channels=4)
    if model.config.objective == "epsilon":
        few = gaussian.respaced(gaussian.schedule("linear"), steps, spacing="trailing")
        return samplers.ddim(predict, noise, schedule=few)
    times, timesteps = flow_grid(steps).tolist(), pipeline_timesteps(model.config, steps).tolist()
    x = noise
    for t, after, label in zip(times, times[1:], timesteps, strict=False):
        x = x + (after - t) * predict(x, torch.full((len(x),), label))
    return x


def test_what_classes_share_is_one_file(diffusers, vae, tmp_path: Path) -> None:
    folders = export_classes(parts_of(small()), NAMES, vae, tmp_path / "pipes")
    shared, own = (f"transformer/diffusion_pytorch_model-0000{n}-of-00002.safetensors" for n in (1, 2))
    for name in (shared, "vae/diffusion_pytorch_model.safetensors"):
        assert len({(folder / name).stat().st_ino for folder in folders}) == 1, name
    assert len({(folder / own).read_bytes() for folder in folders}) == 3
    for folder in folders:
        table = diffusers.DiTPipeline.from_pretrained(folder).transformer.transformer_blocks[1].norm1.emb
        weight = table.class_embedder.embedding_table.weight
        assert weight.shape == (1001, 32)
        assert torch.equal(weight[0], weight[999])
        assert not torch.equal(weight[0], weight[1000])


def test_the_gap_of_a_merged_null_pass(tmp_path: Path) -> None:
    gap = guidance_gap(parts_of(small()), "bee")
    assert gap["conditional"] < 1e-4
    assert 0.01 < gap["null"] < 1
    assert gap["guided"] > gap["null"]
    dense = noisy_dit(small(), NAMES)
    no_tailors = decompose(factorize(dense, KindConfig(learngene_rank=20, tailor_rank=1)))
    for tailor in no_tailors.tailors.values():
        for name in tailor:
            if name.endswith(".sigma"):
                tailor[name].zero_()
    assert guidance_gap(no_tailors, "bee")["guided"] < 1e-4


def test_a_dense_model_of_several_classes(diffusers, vae, tmp_path: Path) -> None:
    model = noisy_dit(small(), NAMES)
    export_pipeline(model, vae, tmp_path / "pipe")
    pipeline = diffusers.DiTPipeline.from_pretrained(tmp_path / "pipe")
    assert pipeline.labels == {"ant": 0, "bee": 1, "cat": 2}
    x, t, y = inputs()
    with torch.no_grad():
        theirs = pipeline.transformer(x, timestep=t, class_labels=torch.where(y == 3, 1000, y)).sample
        torch.testing.assert_close(model(x, t, y), theirs, **CLOSE)


def test_the_command_exports_from_parts(diffusers, vae, tmp_path: Path, capsys) -> None:
    save_components(parts_of(small()), tmp_path / "parts")
    command = ["convert", str(tmp_path / "parts"), str(tmp_path / "out"), "--from", "kindiff"]
    assert main([*command, "--to", "pipeline", "--vae", str(vae), "--classes", "ant", "cat"]) == 0
    printed = capsys.readouterr()
    assert printed.out.split() == [str(tmp_path / "out" / name) for name in ("ant", "cat")]
    assert "ant: guided (scale 4), the exported predictions differ from ours by" in printed.err
    assert diffusers.DiTPipeline.from_pretrained(tmp_path / "out" / "cat").labels == {"cat": 0}
    assert main([*command, "--to", "diffusers"]) == 2
    assert "merged layers hold one class" in capsys.readouterr().err
    one = [
        "convert",
        str(tmp_path / "parts"),
        str(tmp_path / "one"),
        "--from",
        "kindiff",
        "--to",
        "diffusers",
    ]
    assert main([*one, "--classes", "bee"]) == 0
    back = [
        "convert",
        str(tmp_path / "one"),
        str(tmp_path / "back"),
        "--from",
        "diffusers",
        "--to",
        "kindiff",
    ]
    assert main(back) == 0
    assert DiT.from_pretrained(tmp_path / "back").config.num_classes == 1


def test_pipelines_that_cannot_be(vae, tmp_path: Path, capsys) -> None:
    latent, out = noisy_dit(small(), NAMES), tmp_path / "pipe"
    pixels = noisy_dit(
        DiTConfig(input_size=8, channels=3, num_classes=3, width=32, depth=1, heads=4, patch=2), NAMES
    )
    with pytest.raises(UsageError, match="works on pixels"):
        export_pipeline(pixels, vae, out)
    with pytest.raises(UsageError, match="made of components"):
        export_pipeline(parts_of(small()).recombine(), vae, out)
    with pytest.raises(FileNotFoundError, match="no folder of a diffusers AutoencoderKL"):
        export_pipeline(latent, tmp_path, out)
    many = noisy_dit(
        DiTConfig(input_size=4, channels=4, num_classes=1001, width=8, depth=1, heads=2, patch=2)
    )
    with pytest.raises(UsageError, match="has 1001 classes; diffusers' pipeline takes id 1000"):
        export_pipeline(many, vae, out)
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "config.json").write_text('{"kind": "autoencoder"}')
    with pytest.raises(UsageError, match="holds a 'autoencoder'"):
        export_pipeline(latent, tmp_path / "ours", out)
    wide = DiTConfig(input_size=8, channels=8, num_classes=3, width=32, depth=1, heads=4, patch=2)
    with pytest.raises(BadFileError, match="has 4 latent channels and the model 8"):
        export_pipeline(noisy_dit(wide), vae, out)
    assert not out.exists()
    assert main(["convert", "x", "y", "--from", "kindiff", "--to", "pipeline"]) == 2
    assert "give its folder with --vae" in capsys.readouterr().err


def broken(name: str, index: int):
    def change(description, tensors):
        tensors[name] = tensors[name].clone()
        tensors[name].view(-1)[index] += 1
        return description, tensors

    return change


def without(values: dict, name: str) -> dict:
    return {k: v for k, v in values.items() if k != name}


def fused(description, tensors):
    for i in range(3):
        parts = [tensors.pop(f"transformer_blocks.{i}.attn1.to_{m}.weight") for m in "qkv"]
        tensors[f"transformer_blocks.{i}.attn1.to_qkv.weight"] = torch.cat(parts)
    return description, tensors


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            broken("transformer_blocks.2.norm1.emb.class_embedder.embedding_table.weight", 5),
            r"block 2 has another norm1\.emb\.class_embedder\.embedding_table\.weight than block 0",
        ),
        (fused, "one fused to_qkv, where diffusers' layout has separate"),
        (lambda d, t: (d | {"activation_fn": "geglu"}, t), "activation_fn is 'geglu'; a DiT has"),
        (lambda d, t: (d | {"_class_name": "UNet2DModel"}, t), "holds a 'UNet2DModel'"),
        (lambda d, t: (d | {"num_layers": 4}, t), r"has 3 blocks and its config\.json says 4"),
        (lambda d, t: (d | {"num_layers": "many"}, t), "describes no DiT"),
        (lambda d, t: ({k: v for k, v in d.items() if k != "patch_size"}, t), "lacks 'patch_size'"),
        (lambda d, t: (d | {"out_channels": 7}, t), "predicts 7 channels of 4"),
        (lambda d, t: (d | {"num_embeds_ada_norm": 10}, t), r"has the shape \(4, 32\); \(11, 32\) is wanted"),
        (
            lambda d, t: (d, {k: v for k, v in t.items() if k != "proj_out_1.bias"}),
            r"lacks 1 tensors: proj_out_1\.bias",
        ),
        (lambda d, t: (d, to_released(noisy_dit(small(time_features="published")))), "use --from released"),
    ],
)
def test_folders_that_do_not_fit_are_named(change, sentence: str) -> None:
    description, tensors = to_diffusers(noisy_dit(small(), NAMES))
    with pytest.raises(BadFileError, match=sentence):
        from_diffusers(*change(json.loads(json.dumps(description)), dict(tensors)))


def test_more_requests_that_cannot_be_met(tmp_path: Path) -> None:
    description, tensors = to_diffusers(noisy_dit(small(), NAMES))
    with pytest.raises(UsageError, match=r"has 3 classes .* and 1 are named"):
        from_diffusers(description, tensors, classes=ClassSet(("ant",)))
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        load_diffusers(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(description))
    with pytest.raises(FileNotFoundError, match="its weights are missing"):
        load_diffusers(tmp_path)
    index = {"weight_map": {"a": "../elsewhere.safetensors"}}
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BadFileError, match="names a file outside its folder"):
        load_diffusers(tmp_path)
