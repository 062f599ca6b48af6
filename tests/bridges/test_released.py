"""The published DiT layout: against a forward pass written from the paper, round trips, and bad files."""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kindiff.bridges.released import from_released, load_released, save_released, to_released
from kindiff.classes import ClassSet
from kindiff.cli.main import main
from kindiff.components import factorize
from kindiff.config import DiTConfig, KindConfig
from kindiff.errors import BadFileError, UsageError
from kindiff.models import DiT
from random_models import noisy_dit

NAMES = ("ant", "bee", "cat")
HEADS = 4


@pytest.fixture
def model() -> DiT:
    config = DiTConfig(
        input_size=8, channels=4, num_classes=3, width=32, depth=3, heads=HEADS, patch=2, objective="epsilon"
    )
    return noisy_dit(config, NAMES)


def published_forward(state: dict[str, Tensor], x: Tensor, t: Tensor, y: Tensor, heads: int) -> Tensor:
    """DiT with adaLN-zero as the paper and its released weights define it, on the released names."""
    linear = lambda name, h: F.linear(h, state[f"{name}.weight"], state[f"{name}.bias"])  # noqa: E731
    norm = lambda h: F.layer_norm(h, h.shape[-1:], eps=1e-6)  # noqa: E731
    weight = state["x_embedder.proj.weight"]
    width, _, patch, _ = weight.shape
    h = F.conv2d(x, weight, state["x_embedder.proj.bias"], stride=patch).flatten(2).transpose(1, 2)
    h = h + state["pos_embed"]
    frequencies = torch.tensor([10_000 ** (-i / 128) for i in range(128)], dtype=torch.float64)
    angles = t.double()[:, None] * frequencies
    features = torch.cat([angles.cos(), angles.sin()], dim=1).to(x.dtype)
    c = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", features)))
    c = F.silu(c + state["y_embedder.embedding_table.weight"][y])
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    for i in range(depth):
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = (
            part[:, None] for part in linear(f"blocks.{i}.adaLN_modulation.1", c).chunk(6, dim=1)
        )
        qkv = linear(f"blocks.{i}.attn.qkv", norm(h) * (1 + scale_a) + shift_a)
        q, k, v = qkv.unflatten(2, (3, heads, width // heads)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(2, 3) / math.sqrt(width // heads)).softmax(dim=3)
        h = h + gate_a * linear(f"blocks.{i}.attn.proj", (weights @ v).transpose(1, 2).flatten(2))
        inner = F.gelu(linear(f"blocks.{i}.mlp.fc1", norm(h) * (1 + scale_m) + shift_m), approximate="tanh")
        h = h + gate_m * linear(f"blocks.{i}.mlp.fc2", inner)
    shift, scale = (part[:, None] for part in linear("final_layer.adaLN_modulation.1", c).chunk(2, dim=1))
    h = linear("final_layer.linear", norm(h) * (1 + scale) + shift)
    side = x.shape[2] // patch
    return torch.einsum(
        "nhwpqc->nchpwq", h.unflatten(2, (patch, patch, -1)).unflatten(1, (side, side))
    ).reshape(len(x), -1, side * patch, side * patch)


def test_the_published_layout_computes_what_our_model_does(model: DiT) -> None:
    x = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    t, y = torch.tensor([0, 1, 250, 731, 999]), torch.tensor([0, 1, 2, 3, 0])
    with torch.no_grad():
        ours, theirs = model(x, t, y), published_forward(to_released(model), x, t, y, HEADS)
    assert ours.abs().max() > 0.5
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_round_trips_are_lossless(model: DiT, tmp_path: Path, ending: str) -> None:
    save_released(model, tmp_path / f"dit.{ending}")
    again = load_released(tmp_path / f"dit.{ending}", classes=ClassSet(NAMES), heads=HEADS)
    assert again.config == model.config
    assert again.classes == model.classes
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    assert all(parameter.requires_grad for parameter in again.parameters())
    there = to_released(again)
    assert all(torch.equal(tensor, there[name]) for name, tensor in to_released(model).items())


def test_flow_models_and_half_precision(tmp_path: Path) -> None:
    config = DiTConfig(input_size=4, channels=3, num_classes=2, width=16, depth=1, heads=2, patch=2)
    flow = noisy_dit(config)
    tensors = {name: tensor.half() for name, tensor in to_released(flow).items()}
    with pytest.raises(UsageError, match="say --objective flow"):
        from_released(tensors, heads=2)
    again = from_released(tensors, heads=2, objective="flow")
    assert again.config == config
    assert again.patch_embed.weight.dtype == torch.float32


def test_training_checkpoints_give_their_ema(model: DiT, tmp_path: Path) -> None:
    tensors = to_released(model)
    other = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    ema = {f"module.{name}": tensor for name, tensor in tensors.items()}
    torch.save({"model": other, "ema": ema, "opt": {"lr": 1e-4}}, tmp_path / "step.pt")
    again = load_released(tmp_path / "step.pt", heads=HEADS)
    assert torch.equal(again.final.out.weight, model.final.out.weight)
    torch.save(tensors, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(load_released(tmp_path / "old.pt", heads=HEADS).final.out.bias, model.final.out.bias)


class Trap:
    """Unpickling one would call a function."""

    def __reduce__(self) -> tuple:
        return Path.touch, (Path("sprung"),)


@pytest.mark.parametrize("payload", [Trap(), argparse.Namespace(lr=1)])
def test_a_pickle_with_code_in_it_is_refused(
    model: DiT, tmp_path: Path, monkeypatch, capsys, payload
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"ema": to_released(model), "args": payload}, "trap.pt")
    with pytest.raises(BadFileError, match=r"trap\.pt is refused: beside tensors it holds Python objects"):
        load_released("trap.pt")
    assert main(["convert", "trap.pt", "out", "--from", "released", "--to", "kindiff"]) == 1
    assert "is refused" in capsys.readouterr().err
    assert not (tmp_path / "sprung").exists()
    assert not (tmp_path / "out").exists()


def without(name: str):
    return lambda tensors: {k: v for k, v in tensors.items() if k != name}


def unfused(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    split = {}
    for name, tensor in tensors.items():
        if ".qkv." in name:
            split |= {name.replace("qkv", m): part for m, part in zip("qkv", tensor.chunk(3), strict=True)}
        else:
            split[name] = tensor
    return split


def ours(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(from_released(tensors, heads=HEADS).state_dict())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (without("blocks.1.mlp.fc1.bias"), r"lacks 1 tensors: blocks\.1\.mlp\.fc1\.bias"),
        (without("x_embedder.proj.weight"), r"lacks 'x_embedder\.proj\.weight'"),
        (lambda t: t | {"blocks.0.extra": torch.ones(1)}, r"has 1 unknown ones: blocks\.0\.extra"),
        (lambda t: t | {"blocks.99999999.x": torch.ones(1)}, "names block 99999999 and has"),
        (
            lambda t: t | {"final_layer.linear.bias": torch.ones(3)},
            r"final_layer\.linear\.bias has the shape \(3,\)",
        ),
        (lambda t: t | {"t_embedder.mlp.0.bias": torch.ones(32).long()}, "weights are floating point"),
        (lambda t: t | {"pos_embed": t["pos_embed"] + 1}, "pos_embed is not the fixed table"),
        (unfused, "separate q, k and v, where the published layout has one fused attn.qkv"),
        (ours, r"kindiff's \(separate q, k, v\), not the published .* use --from kindiff"),
    ],
)
def test_files_that_do_not_fit_are_named(model: DiT, change, sentence: str) -> None:
    with pytest.raises(BadFileError, match=sentence):
        from_released(change(to_released(model)), heads=HEADS)


def test_requests_that_cannot_be_met(model: DiT, tmp_path: Path) -> None:
    tensors = to_released(model)
    with pytest.raises(UsageError, match=r"has 3 classes .* and 2 are named"):
        from_released(tensors, classes=ClassSet(("ant", "bee")), heads=HEADS)
    with pytest.raises(UsageError, match="give --heads"):
        from_released(tensors)
    with pytest.raises(UsageError, match="made of components"):
        to_released(factorize(model, KindConfig(learngene_rank=4, tailor_rank=1)))
    with pytest.raises(UsageError, match=r"ending '\.bin'"):
        save_released(model, tmp_path / "x.bin")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [(b"", "damaged|no torch checkpoint"), (b"not a checkpoint", "no torch checkpoint|damaged")],
)
def test_damaged_files(tmp_path: Path, content: bytes, sentence: str) -> None:
    (tmp_path / "bad.pt").write_bytes(content)
    with pytest.raises(BadFileError, match=sentence):
        load_released(tmp_path / "bad.pt")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_released(tmp_path / "none.pt")


def test_a_truncated_file_and_one_without_weights(model: DiT, tmp_path: Path) -> None:
    save_released(model, tmp_path / "dit.pt")
    whole = (tmp_path / "dit.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadFileError, match="damaged"):
        load_released(tmp_path / "cut.pt")
    torch.save({"step": 3}, tmp_path / "none.pt")
    with pytest.raises(BadFileError, match="holds no state dict"):
        load_released(tmp_path / "none.pt")


def test_the_command_converts_and_names_classes(model: DiT, tmp_path: Path, capsys) -> None:
    save_released(model, tmp_path / "dit.pt")
    (tmp_path / "names.txt").write_text("ant\nbee\ncat\n")
    arguments = [
        "convert",
        str(tmp_path / "dit.pt"),
        str(tmp_path / "model"),
        "--from",
        "released",
        "--to",
        "kindiff",
    ]
    assert main([*arguments, "--heads", "4", "--names", str(tmp_path / "names.txt")]) == 0
    assert DiT.from_pretrained(tmp_path / "model").classes.names == NAMES
    assert main([*arguments, "--names", "imagenet", "--heads", "4"]) == 2
    assert "has 3 classes (and the null row) and 1000 are named" in capsys.readouterr().err
    back = [
        "convert",
        str(tmp_path / "model"),
        str(tmp_path / "back.pt"),
        "--from",
        "kindiff",
        "--to",
        "released",
    ]
    assert main(back) == 0
    again = torch.load(tmp_path / "back.pt", weights_only=True)
    assert all(torch.equal(again[name], tensor) for name, tensor in to_released(model).items())
    assert main([*back, "--vae", "x"]) == 2
    assert "--vae goes with --to pipeline only" in capsys.readouterr().err


@pytest.mark.parametrize("size", ["DiT-T/4", pytest.param("DiT-S/2", marks=pytest.mark.slow)])
def test_a_released_model_factorised(size: str) -> None:
    """At full rank the same outputs; at a lower rank each matrix's error is the singular values left out."""
    config = DiTConfig.preset(size, num_classes=10, objective="epsilon", input_size=16)
    dense = from_released(to_released(noisy_dit(config)), heads=config.heads)
    x = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    t, y = torch.tensor([3, 700]), torch.tensor([1, 10])
    full = factorize(dense, KindConfig(learngene_rank=config.width, tailor_rank=1))
    with torch.no_grad():
        torch.testing.assert_close(full(x, t, y), dense(x, t, y), rtol=0, atol=1e-4)
    rank = config.width // 3
    low = factorize(dense, KindConfig(learngene_rank=rank, tailor_rank=0))
    for (name, a), (_, b) in zip(dense.named_matrices(), low.named_matrices(), strict=True):
        left_out = torch.linalg.svdvals(a.weight)[rank:].norm()
        error = torch.linalg.norm(a.weight - b.merged_weight())
        torch.testing.assert_close(error, left_out, rtol=1e-3, atol=1e-4, msg=name)


MEASURE = """
import resource, sys
from pathlib import Path
import torch
from kindiff.bridges.released import load_released
from kindiff.bridges.diffusers_dit import save_diffusers
from kindiff.bridges.diffusers_pipeline import pipeline_timesteps
folder = Path(sys.argv[1])
model = load_released(folder / "xl.pt")
model.save_pretrained(folder / "model")
save_diffusers(model, folder / "diffusers", timesteps_N=pipeline_timesteps(model.config, 50))
print(sum(p.numel() for p in model.parameters()), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""


@pytest.mark.slow
def test_an_xl_model_is_converted_within_six_gib(tmp_path: Path) -> None:
    config = DiTConfig.preset("DiT-XL/2", num_classes=1000, objective="epsilon")
    with torch.device("meta"):
        empty = to_released(DiT(config))
    tensors = {name: torch.full(tensor.shape, 0.01) for name, tensor in empty.items() if name != "pos_embed"}
    torch.save(tensors | {"pos_embed": positions(config)}, tmp_path / "xl.pt")
    del tensors
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, check=True
    )
    count, gib = done.stdout.split()
    assert int(count) == 674_834_720  # 675M, as published
    assert float(gib) < 6


def positions(config: DiTConfig) -> Tensor:
    from kindiff.models.layers import position_table

    return position_table(config.width, config.input_size // config.patch).unsqueeze(0)
