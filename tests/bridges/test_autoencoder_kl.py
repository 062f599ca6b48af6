"""diffusers' AutoencoderKL as the autoencoder of latent models: same numbers, its factors honoured, one whole story."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kindiff import checkpoint
from kindiff.bridges.diffusers_pipeline import export_pipeline
from kindiff.cli.main import main
from kindiff.config import AutoencoderConfig, DataConfig, DiTConfig, EncodeConfig, SampleConfig
from kindiff.errors import BadFileError, UsageError
from kindiff.models.autoencoder import Autoencoder
from kindiff.models.autoencoder_kl import WEIGHTS, AutoencoderKL
from kindiff.models.codec import open_codec
from kindiff.pipeline import DiTPipeline, to_uint8
from kindiff.train.encoding import encode
from random_models import noisy, noisy_dit
from toys import NEW_SHAPES, SHAPES, write_image_folder

SD = (128, 256, 512, 512)
"""block_out_channels of Stable Diffusion's autoencoder."""


@pytest.fixture(scope="module")
def diffusers():
    """The library, imported once: it takes some ten seconds."""
    library = pytest.importorskip("diffusers")
    library.logging.set_verbosity_error()
    library.utils.logging.disable_progress_bar()
    return library


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("KINDIFF_CACHE", str(tmp_path / "cache"))


def random_vae(
    diffusers, folder: Path, channels: tuple[int, ...] = (8, 8, 16, 16), **settings: object
) -> Path:
    """The graph of Stable Diffusion's autoencoder with random weights, narrower unless told otherwise."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=channels, latent_channels=4, layers_per_block=2, norm_num_groups=8 if channels != SD else 32,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels), sample_size=256, **settings,
    )  # fmt: skip
    noisy(vae, scale=0.02).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def vae(diffusers, tmp_path_factory) -> Path:
    return random_vae(diffusers, tmp_path_factory.mktemp("vae") / "vae")


FACTORS = [
    ({"scaling_factor": 0.18215}, 0.0, 0.18215),
    ({"scaling_factor": 1.5305, "shift_factor": 0.0609}, 0.0609, 1.5305),
    ({"scaling_factor": 0.5, "latents_mean": [0.1, 0.2, 0.3, 0.4], "latents_std": [1.0, 2.0, 4.0, 8.0]},
     [0.1, 0.2, 0.3, 0.4], [0.5, 0.25, 0.125, 0.0625]),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "shift", "scale"), FACTORS)
def test_its_factors_are_honoured_both_ways(diffusers, tmp_path: Path, settings, shift, scale) -> None:
    folder = random_vae(diffusers, tmp_path / "vae", (8, 16), **settings)
    ours, theirs = open_codec(folder), diffusers.AutoencoderKL.from_pretrained(folder)
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    shift, scale = (torch.as_tensor(value).float().view(-1, 1, 1) for value in (shift, scale))
    with torch.no_grad():
        posterior = theirs.encode(x).latent_dist
        mean, log_variance = ours.encode(x)
        torch.testing.assert_close(mean, (posterior.mean - shift) * scale)
        torch.testing.assert_close((log_variance / 2).exp(), posterior.std * scale)
        torch.testing.assert_close(
            ours.decode(mean), theirs.decode(posterior.mean).sample, atol=1e-5, rtol=1e-4
        )
    assert (ours.factor, ours.channels, ours.latent_side(16)) == (2, 4, 8)


def test_another_scale_is_another_autoencoder(diffusers, tmp_path: Path) -> None:
    folders = [random_vae(diffusers, tmp_path / str(i), (8, 16), **f) for i, (f, _, _) in enumerate(FACTORS)]
    assert len({open_codec(folder).fingerprint() for folder in folders}) == 3


def test_written_read_by_diffusers_and_the_same_bytes(diffusers, vae: Path, tmp_path: Path) -> None:
    ours = open_codec(vae)
    for name in ("a", "b"):
        ours.save_pretrained(tmp_path / name)
    again = diffusers.AutoencoderKL.from_pretrained(tmp_path / "a", use_safetensors=True)
    for name, tensor in ours.vae.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    for file in ("config.json", WEIGHTS):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    (tmp_path / "pipe").mkdir()
    checkpoint.write_json(tmp_path / "pipe" / "model_index.json", {"_class_name": "DiTPipeline"})
    shutil.copytree(vae, tmp_path / "pipe" / "vae")
    assert AutoencoderKL.from_pretrained(tmp_path / "pipe").fingerprint() == ours.fingerprint()


def test_a_model_directory_holds_it_and_draws_with_it(vae: Path, tmp_path: Path) -> None:
    codec = open_codec(vae)
    config = DiTConfig(
        input_size=4, channels=4, num_classes=2, width=32, depth=1, heads=2, patch=2, objective="epsilon",
        autoencoder=codec.fingerprint(),
    )  # fmt: skip
    pipeline = DiTPipeline(noisy_dit(config), codec)
    sampling = SampleConfig(steps=3, device="cpu")
    images = pipeline.sample([0, 1], sampling)
    assert images.shape == (2, 32, 32, 3)
    assert images.std() > 1
    pipeline.save_pretrained(tmp_path / "model")
    assert (tmp_path / "model" / "autoencoder" / WEIGHTS).is_file()
    assert np.array_equal(DiTPipeline.from_pretrained(tmp_path / "model").sample([0, 1], sampling), images)
    other = Autoencoder(AutoencoderConfig(width=8))
    with pytest.raises(UsageError, match="not the one whose latents"):
        DiTPipeline(pipeline.model, other)


def test_damaged_and_foreign_folders_are_named(vae: Path, tmp_path: Path) -> None:
    def copy(name: str) -> Path:
        return Path(shutil.copytree(vae, tmp_path / name))

    cut = copy("cut")
    (cut / WEIGHTS).write_bytes((vae / WEIGHTS).read_bytes()[:-100])
    lacking = copy("lacking")
    tensors = {name: tensor.clone() for name, tensor in checkpoint.read_tensors(vae / WEIGHTS).items()}
    checkpoint.write_tensors(
        lacking / WEIGHTS, {k: v for k, v in tensors.items() if k != "quant_conv.bias"}, {"format": "pt"}
    )
    other_shape = copy("other")
    config = json.loads((other_shape / "config.json").read_text())
    checkpoint.write_json(other_shape / "config.json", config | {"latent_channels": 8})
    foreign = copy("foreign")
    checkpoint.write_json(foreign / "config.json", config | {"_class_name": "AsymmetricAutoencoderKL"})
    grey = copy("grey")
    checkpoint.write_json(grey / "config.json", config | {"in_channels": 1})
    pickled = copy("pickled")
    torch.save(tensors, pickled / "diffusion_pytorch_model.bin")
    (pickled / WEIGHTS).unlink()
    for folder, named in (
        (cut, "damaged or truncated"), (lacking, "quant_conv.bias"), (other_shape, "do not fit"),
        (foreign, "AsymmetricAutoencoderKL"), (grey, "do not fit"), (pickled, "safetensors"),
    ):  # fmt: skip
        with pytest.raises((BadFileError, FileNotFoundError), match=named):
            open_codec(folder)
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        AutoencoderKL.from_pretrained(tmp_path / "nowhere")


def test_a_pipeline_folder_takes_the_models_own(diffusers, vae: Path, tmp_path: Path, capsys) -> None:
    codec = open_codec(vae)
    config = DiTConfig(
        input_size=4, channels=4, num_classes=2, width=32, depth=1, heads=2, patch=2, objective="epsilon",
        autoencoder=codec.fingerprint(), time_features="diffusers",
    )  # fmt: skip
    model = noisy_dit(config)
    DiTPipeline(model, codec).save_pretrained(tmp_path / "model")
    run("convert", tmp_path / "model", tmp_path / "pipe", "--from", "kindiff", "--to", "pipeline")
    exported = diffusers.AutoencoderKL.from_pretrained(tmp_path / "pipe" / "vae")
    assert AutoencoderKL(exported).fingerprint() == codec.fingerprint()
    shifted = random_vae(diffusers, tmp_path / "shifted", shift_factor=0.1)
    with pytest.raises(UsageError, match="has a shift_factor, which diffusers' DiT pipeline ignores"):
        export_pipeline(model, shifted, tmp_path / "out")
    scaled = random_vae(diffusers, tmp_path / "scaled", scaling_factor=0.5)
    with pytest.raises(UsageError, match="scaled is not the autoencoder whose latents"):
        export_pipeline(model, scaled, tmp_path / "out")


def run(*arguments: object) -> None:
    assert main([str(argument) for argument in arguments]) == 0, arguments


@pytest.mark.slow
def test_encode_pretrain_transfer_sample_evaluate(vae: Path, tmp_path: Path, capsys) -> None:
    """The whole story on an image folder, through AutoencoderKL's own graph (narrow) with random weights."""
    for name, shapes in (("base", SHAPES), ("novel", NEW_SHAPES)):
        write_image_folder(tmp_path / name, shapes, per_class=4)
        run("encode", tmp_path / f"{name}-latents", "--data.source", tmp_path / name, "--data.size", 32,
            "--autoencoder", vae, "--workers", 1)  # fmt: skip
    loop = ["--train.steps", 4, "--train.batch", 6, "--train.lr", 0.003, "--train.save-every", 2]
    run("pretrain", tmp_path / "run", "--data.source", tmp_path / "base-latents", "--data.latent-shape", 4, 4,
        "--model.preset", "DiT-T/2", "--objective.kind", "epsilon", "--kind.learngene-rank", 12,
        "--kind.tailor-rank", 2, *loop)  # fmt: skip
    run("decompose", tmp_path / "run" / "model", tmp_path / "parts")
    run("transfer", tmp_path / "parts", tmp_path / "new", "--data.source", tmp_path / "novel-latents",
        "--rank", 4, "--share", "task", "--train-also", "bias", *loop)  # fmt: skip
    model = tmp_path / "new" / "model"
    run("sample", model, tmp_path / "grid.png", "--per-class", 2, "--steps", 2)
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.size == (2 * 34 + 2, 2 * 34 + 2)
    capsys.readouterr()
    run("evaluate", model, "--reference", tmp_path / "novel", "--count", 8, "--steps", 2, "--json")
    score = json.loads(capsys.readouterr().out)
    assert score["protocol"]["count"] == 8
    assert score["distance"] > 0
    # latents of another autoencoder are refused
    Autoencoder(AutoencoderConfig(width=8)).save_pretrained(tmp_path / "small")
    run("encode", tmp_path / "other", "--data.source", tmp_path / "novel", "--data.size", 16,
        "--autoencoder", tmp_path / "small", "--workers", 1)  # fmt: skip
    capsys.readouterr()
    assert main([
        "transfer", str(tmp_path / "parts"), str(tmp_path / "bad"), "--data.source", str(tmp_path / "other"),
    ]) == 2  # fmt: skip
    assert "another autoencoder" in capsys.readouterr().err


@pytest.mark.slow
def test_the_real_configuration(diffusers, tmp_path: Path) -> None:
    """Stable Diffusion's autoencoder as it is, 83.7M parameters, at 64 px: encode, then decode in the pipeline."""
    folder = random_vae(diffusers, tmp_path / "vae", SD)
    write_image_folder(tmp_path / "photos", SHAPES[:2], per_class=2)
    config = EncodeConfig(
        data=DataConfig(source=str(tmp_path / "photos"), size=64), autoencoder=str(folder), workers=1
    )
    latents = encode(config, tmp_path / "latents")
    codec = latents.autoencoder()
    assert sum(parameter.numel() for parameter in codec.vae.parameters()) == 83_653_863
    assert (latents.channels, latents.size, codec.factor) == (4, 8, 8)
    theirs = diffusers.AutoencoderKL.from_pretrained(folder)
    z = torch.from_numpy(latents.fetch(np.array([3]), np.array([True])))
    with torch.no_grad():
        expected = to_uint8(theirs.decode(z / 0.18215).sample)
        assert int(np.abs(to_uint8(codec.decode(z)).astype(int) - expected.astype(int)).max()) <= 1
    model = noisy_dit(
        DiTConfig(
            input_size=8, channels=4, num_classes=2, width=32, depth=1, heads=2, patch=2, objective="epsilon",
            autoencoder=latents.autoencoder_hash,
        )
    )  # fmt: skip
    assert DiTPipeline(model, codec).sample([0], SampleConfig(steps=2, device="cpu")).shape == (1, 64, 64, 3)
