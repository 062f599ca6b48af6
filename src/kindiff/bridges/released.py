"""The layout of the published DiT files (facebookresearch/DiT): one state dict, q, k and v fused.

Shapes in messages are the files' own: (features out, features in), and (D, C, P, P) for the patch embedding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from kindiff import checkpoint
from kindiff.bridges import reading
from kindiff.classes import ClassSet
from kindiff.config import DIT_SIZES, DiTConfig
from kindiff.errors import BadFileError, UsageError
from kindiff.models.dit import FREQUENCIES, DiT
from kindiff.models.layers import position_table

LAYER_NAMES = {
    "time_embed.0": "t_embedder.mlp.0",
    "time_embed.2": "t_embedder.mlp.2",
    "final.modulation": "final_layer.adaLN_modulation.1",
    "final.out": "final_layer.linear",
}
"""kindiff's name -> the published one, outside the blocks."""
BLOCK_NAMES = {
    "modulation": "adaLN_modulation.1",
    "o": "attn.proj",
    "mlp_in": "mlp.fc1",
    "mlp_out": "mlp.fc2",
}
"""The same inside a block; q, k and v are the thirds of attn.qkv."""


def to_released(model: DiT) -> dict[str, Tensor]:
    """A dense model's tensors in the published layout. UsageError for components or diffusers' time features."""
    ours, config = reading.dense_state(model), model.config
    if config.time_features != "published":
        raise UsageError(
            "the model has diffusers' timestep features and the published DiT has others, so its outputs would "
            "change; convert it to diffusers instead."
        )
    theirs = {
        "x_embedder.proj.weight": ours["patch_embed.weight"].view(
            config.width, config.channels, config.patch, config.patch
        ),
        "x_embedder.proj.bias": ours["patch_embed.bias"],
        "pos_embed": position_table(config.width, config.input_size // config.patch).unsqueeze(0),
        "y_embedder.embedding_table.weight": ours["class_embed.weight"],
    }
    for leaf in ("weight", "bias"):
        for mine, name in LAYER_NAMES.items():
            theirs[f"{name}.{leaf}"] = ours[f"{mine}.{leaf}"]
        for i in range(config.depth):
            parts = [ours[f"blocks.{i}.{matrix}.{leaf}"] for matrix in "qkv"]
            theirs[f"blocks.{i}.attn.qkv.{leaf}"] = torch.cat(parts)
            for mine, name in BLOCK_NAMES.items():
                theirs[f"blocks.{i}.{name}.{leaf}"] = ours[f"blocks.{i}.{mine}.{leaf}"]
    return theirs


def from_released(
    tensors: Mapping[str, Tensor],
    *,
    classes: ClassSet | None = None,
    heads: int = 0,
    objective: Literal["auto", "flow", "epsilon"] = "auto",
    where: str = "the checkpoint",
) -> DiT:
    """A dense model from the published layout; its tensors share memory with the given ones where they can.

    heads: attention heads, 0 for those of the published size of this width and depth. objective auto: epsilon,
    told by the doubled output channels. BadFileError names missing or unknown tensors, another layout, wrong
    shapes or other positions than the fixed sines; UsageError a class count or head count that does not fit.
    """
    reading.check_layout(where, tensors, "released")
    config = _config(tensors, heads, objective, where)
    reading.check_shapes(where, tensors, _shapes(config))
    reading.check_classes(where, config.num_classes, classes)
    positions = position_table(config.width, config.input_size // config.patch)
    if not torch.allclose(tensors["pos_embed"][0].float(), positions, rtol=0, atol=1e-2):
        raise BadFileError(f"{where}: pos_embed is not the fixed table of sines that DiT has.")
    ours = {
        "patch_embed.weight": tensors["x_embedder.proj.weight"].flatten(1),
        "patch_embed.bias": tensors["x_embedder.proj.bias"],
        "class_embed.weight": tensors["y_embedder.embedding_table.weight"],
    }
    for leaf in ("weight", "bias"):
        for mine, name in LAYER_NAMES.items():
            ours[f"{mine}.{leaf}"] = tensors[f"{name}.{leaf}"]
        for i in range(config.depth):
            for matrix, part in zip("qkv", tensors[f"blocks.{i}.attn.qkv.{leaf}"].chunk(3), strict=True):
                ours[f"blocks.{i}.{matrix}.{leaf}"] = part
            for mine, name in BLOCK_NAMES.items():
                ours[f"blocks.{i}.{mine}.{leaf}"] = tensors[f"blocks.{i}.{name}.{leaf}"]
    return reading.filled(config, classes, ours)


def load_released(
    path: str | Path,
    *,
    classes: ClassSet | None = None,
    heads: int = 0,
    objective: Literal["auto", "flow", "epsilon"] = "auto",
) -> DiT:
    """A dense model from a published .pt file, or the same tensors as .safetensors; see `from_released`."""
    tensors = reading.read_state(Path(path))
    return from_released(tensors, classes=classes, heads=heads, objective=objective, where=str(path))


def save_released(model: DiT, path: str | Path) -> None:
    """Write a dense model in the published layout: a .safetensors file, or a .pt state dict."""
    path = Path(path)
    if path.suffix not in (".pt", ".safetensors"):
        raise UsageError(
            f"{path} has the ending {path.suffix!r}; the published layout is a .pt or .safetensors."
        )
    tensors = to_released(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        if path.suffix == ".pt":
            torch.save({name: _alone(tensor) for name, tensor in tensors.items()}, temporary)
        else:
            checkpoint.write_tensors(temporary, tensors)
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)


def _alone(tensor: Tensor) -> Tensor:
    """torch.save writes a view's whole storage: a view becomes a tensor of its own."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _config(tensors: Mapping[str, Tensor], heads: int, objective: str, where: str) -> DiTConfig:
    width, channels, patch, _ = reading.shape_of(where, tensors, "x_embedder.proj.weight", 4)
    rows, _ = reading.shape_of(where, tensors, "y_embedder.embedding_table.weight", 2)
    tokens = reading.shape_of(where, tensors, "pos_embed", 3)[1]
    hidden, _ = reading.shape_of(where, tensors, "blocks.0.mlp.fc1.weight", 2)
    outputs, _ = reading.shape_of(where, tensors, "final_layer.linear.weight", 2)
    depth = reading.depth_of(where, tensors, "blocks")
    known = {(w, d): h for w, d, h in DIT_SIZES.values()}
    heads = heads or known.get((width, depth), 0)
    if not heads:
        raise UsageError(
            f"{where} has width {width} and depth {depth}, no published size, and its file does not tell the "
            "attention heads; give --heads."
        )
    if objective == "auto":
        if outputs != 2 * channels * patch**2:
            raise UsageError(
                f"{where} predicts {outputs // patch**2} channels of {channels}, without learned variances; say "
                "--objective flow if it is a flow model whose output is noise minus data."
            )
        objective = "epsilon"
    if math.isqrt(tokens) ** 2 != tokens:
        raise BadFileError(f"{where}: pos_embed has {tokens} tokens; the input must be square.")
    try:
        return DiTConfig(
            input_size=math.isqrt(tokens) * patch, channels=channels, num_classes=rows - 1, width=width,
            depth=depth, heads=heads, patch=patch, mlp_ratio=hidden / width,
            objective="epsilon" if objective == "epsilon" else "flow",
        )  # fmt: skip
    except UsageError as error:
        raise BadFileError(f"{where} is no DiT: {error}") from None


def _shapes(config: DiTConfig) -> dict[str, tuple[int, ...]]:
    """The published layout's names and shapes."""
    width, hidden, patch = config.width, config.hidden, config.patch
    layers = {
        "t_embedder.mlp.0": (width, FREQUENCIES),
        "t_embedder.mlp.2": (width, width),
        "final_layer.adaLN_modulation.1": (2 * width, width),
        "final_layer.linear": (patch**2 * config.out_channels, width),
    }
    for i in range(config.depth):
        layers |= {
            f"blocks.{i}.attn.qkv": (3 * width, width),
            f"blocks.{i}.attn.proj": (width, width),
            f"blocks.{i}.mlp.fc1": (hidden, width),
            f"blocks.{i}.mlp.fc2": (width, hidden),
            f"blocks.{i}.adaLN_modulation.1": (6 * width, width),
        }
    shapes: dict[str, tuple[int, ...]] = {
        "x_embedder.proj.weight": (width, config.channels, patch, patch),
        "x_embedder.proj.bias": (width,),
        "pos_embed": (1, config.tokens, width),
        "y_embedder.embedding_table.weight": (config.num_classes + 1, width),
    }
    for name, shape in layers.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes
