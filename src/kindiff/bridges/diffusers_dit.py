"""diffusers' DiTTransformer2DModel: a folder with config.json and diffusion_pytorch_model.safetensors.

Two things of it are unlike the published DiT. Every block has its own copy of the timestep and label embedders
(here: written out for each block; read only where all copies are equal). And the frequencies of its timestep
features are others, so the same weights do not give the same outputs; see `fitted_time_weight`.

N timesteps, F features, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from kindiff import checkpoint
from kindiff.bridges import reading
from kindiff.classes import ClassSet
from kindiff.config import DiTConfig
from kindiff.errors import BadFileError, UsageError
from kindiff.models.dit import FREQUENCIES, DiT
from kindiff.models.layers import timestep_features

CLASS = "DiTTransformer2DModel"
WEIGHTS = "diffusion_pytorch_model"
LAYER_NAMES = {"final.modulation": "proj_out_1", "final.out": "proj_out_2"}
"""kindiff's name -> diffusers', outside the blocks."""
BLOCK_NAMES = {
    "modulation": "norm1.linear",
    "q": "attn1.to_q",
    "k": "attn1.to_k",
    "v": "attn1.to_v",
    "o": "attn1.to_out.0",
    "mlp_in": "ff.net.0.proj",
    "mlp_out": "ff.net.2",
}
"""The same inside a block."""
EMBEDDERS = {
    "time_embed.0.weight": "norm1.emb.timestep_embedder.linear_1.weight",
    "time_embed.0.bias": "norm1.emb.timestep_embedder.linear_1.bias",
    "time_embed.2.weight": "norm1.emb.timestep_embedder.linear_2.weight",
    "time_embed.2.bias": "norm1.emb.timestep_embedder.linear_2.bias",
    "class_embed.weight": "norm1.emb.class_embedder.embedding_table.weight",
}
"""What every block has a copy of."""
FIXED = {
    "norm_type": "ada_norm_zero",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_elementwise_affine": False,
    "dropout": 0.0,
}
"""What diffusers' config may vary and DiT does not."""

Time = Literal["fit", "copy"]
"""How weights go where the timestep features are others. fit: exact at chosen timesteps. copy: as they are."""


def fitted_time_weight(weight_DF: Tensor, timesteps_N: Tensor) -> Tensor:
    """The first timestep matrix for diffusers' frequencies: its products at these timesteps are unchanged.

    Of all such matrices the one nearest to the given one (least squares in float64): W + (P - Q) W^T fitted on
    Q, with P and Q the published and diffusers' features (N, F). N must not exceed F = 256; at other timesteps
    the products differ. UsageError when the timesteps are too many or too close to be told apart.
    """
    published = timestep_features(timesteps_N, FREQUENCIES).double()
    other = timestep_features(timesteps_N, FREQUENCIES, reach_last=True).double()
    values = torch.linalg.svdvals(other)
    if len(timesteps_N) > FREQUENCIES or values[-1] < 1e-4 * values[0]:
        raise UsageError(
            f"{len(timesteps_N)} timesteps are too many to fit diffusers' timestep features to; use 50 steps or "
            "fewer, or pre-train with model.time_features diffusers, which needs no fit."
        )
    change = torch.linalg.lstsq(other, (published - other) @ weight_DF.double().T, driver="gelsd").solution
    return (weight_DF.double() + change.T).to(weight_DF.dtype)


def to_diffusers(
    model: DiT, *, time: Time = "fit", timesteps_N: Tensor | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A dense model as (config.json, tensors) of diffusers' DiT; the embedders' copies share memory.

    A model with the published timestep features is fitted at timesteps_N (time fit), or its weights are copied
    as they are (time copy: lossless to read back, other outputs). UsageError for components, or for an input
    that diffusers' DiT does not have.
    """
    ours, config = reading.dense_state(model), model.config
    if config.mlp_ratio != 4:
        raise UsageError(f"the MLP is {config.mlp_ratio} times the width; diffusers' DiT has 4.")
    if config.time_features == "published" and time == "fit":
        if timesteps_N is None:
            raise UsageError("a fit to diffusers' timestep features needs the timesteps of the sampler.")
        ours["time_embed.0.weight"] = fitted_time_weight(ours["time_embed.0.weight"], timesteps_N)
    side = (config.width, config.channels, config.patch, config.patch)
    theirs = {
        "pos_embed.proj.weight": ours["patch_embed.weight"].view(side),
        "pos_embed.proj.bias": ours["patch_embed.bias"],
    }
    for leaf in ("weight", "bias"):
        for mine, name in LAYER_NAMES.items():
            theirs[f"{name}.{leaf}"] = ours[f"{mine}.{leaf}"]
        for i in range(config.depth):
            for mine, name in BLOCK_NAMES.items():
                theirs[f"transformer_blocks.{i}.{name}.{leaf}"] = ours[f"blocks.{i}.{mine}.{leaf}"]
    for i in range(config.depth):
        theirs |= {f"transformer_blocks.{i}.{name}": ours[mine] for mine, name in EMBEDDERS.items()}
    description = FIXED | {
        "_class_name": CLASS,
        "num_attention_heads": config.heads,
        "attention_head_dim": config.width // config.heads,
        "in_channels": config.channels,
        "out_channels": config.out_channels,
        "num_layers": config.depth,
        "sample_size": config.input_size,
        "patch_size": config.patch,
        "num_embeds_ada_norm": config.num_classes,
        "norm_eps": config.mlp_norm_eps,
    }
    return description, theirs


def from_diffusers(
    description: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    classes: ClassSet | None = None,
    time_features: Literal["published", "diffusers"] = "diffusers",
    where: str = "the folder",
) -> DiT:
    """A dense model that computes what diffusers' does, from its config.json and tensors.

    time_features: `published` for weights that were trained with the published frequencies and only copied into
    this layout; then the model computes what they were trained for. BadFileError names a setting that DiT does
    not have, missing or unknown tensors, another layout, or the block whose embedders differ from block 0's.
    """
    config = _config(description, time_features, where)
    reading.check_layout(where, tensors, "diffusers")
    depth = reading.depth_of(where, tensors, "transformer_blocks")
    if depth != config.depth:
        raise BadFileError(f"{where} has {depth} blocks and its config.json says {config.depth}.")
    reading.check_shapes(where, tensors, _shapes(config))
    reading.check_classes(where, config.num_classes, classes)
    for i in range(1, config.depth):
        for name in EMBEDDERS.values():
            if not torch.equal(
                tensors[f"transformer_blocks.{i}.{name}"], tensors[f"transformer_blocks.0.{name}"]
            ):
                raise BadFileError(
                    f"{where}: block {i} has another {name} than block 0; a DiT has one embedder for all blocks, so "
                    "these weights cannot be read (were they fine-tuned in diffusers?)."
                )
    ours = {
        "patch_embed.weight": tensors["pos_embed.proj.weight"].flatten(1),
        "patch_embed.bias": tensors["pos_embed.proj.bias"],
    } | {mine: tensors[f"transformer_blocks.0.{name}"] for mine, name in EMBEDDERS.items()}
    for leaf in ("weight", "bias"):
        for mine, name in LAYER_NAMES.items():
            ours[f"{mine}.{leaf}"] = tensors[f"{name}.{leaf}"]
        for i in range(config.depth):
            for mine, name in BLOCK_NAMES.items():
                ours[f"blocks.{i}.{mine}.{leaf}"] = tensors[f"transformer_blocks.{i}.{name}.{leaf}"]
    return reading.filled(config, classes, ours)


def load_diffusers(
    folder: str | Path,
    *,
    classes: ClassSet | None = None,
    time_features: Literal["published", "diffusers"] = "diffusers",
) -> DiT:
    """A dense model from a DiTTransformer2DModel folder, or a pipeline folder's `transformer`."""
    folder = Path(folder)
    if (folder / "model_index.json").is_file():
        folder = folder / "transformer"
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} has no config.json; give a folder that diffusers saved.")
    description = checkpoint.read_json(folder / "config.json")
    return from_diffusers(
        description, _read_weights(folder), classes=classes, time_features=time_features, where=str(folder)
    )


def save_diffusers(
    model: DiT, folder: str | Path, *, time: Time = "fit", timesteps_N: Tensor | None = None
) -> None:
    """Write a dense model as a DiTTransformer2DModel folder; it appears whole or not at all."""
    description, tensors = to_diffusers(model, time=time, timesteps_N=timesteps_N)
    with checkpoint.new_directory(Path(folder)) as target:
        checkpoint.write_json(target / "config.json", description)
        checkpoint.write_tensors(target / f"{WEIGHTS}.safetensors", tensors, {"format": "pt"})


def _read_weights(folder: Path) -> dict[str, Tensor]:
    index = folder / f"{WEIGHTS}.safetensors.index.json"
    if index.is_file():
        files = sorted(set(map(str, checkpoint.read_json(index).get("weight_map", {}).values())))
        if any(Path(name).name != name for name in files):
            raise BadFileError(f"{index} names a file outside its folder.")
        return {k: v for name in files for k, v in reading.read_state(folder / name).items()}
    for ending in ("safetensors", "bin"):
        if (folder / f"{WEIGHTS}.{ending}").is_file():
            return reading.read_state(folder / f"{WEIGHTS}.{ending}")
    raise FileNotFoundError(
        f"{folder} has neither {WEIGHTS}.safetensors nor its index; its weights are missing."
    )


def _config(description: Mapping[str, Any], time_features: Any, where: str) -> DiTConfig:
    if description.get("_class_name") not in (CLASS, "Transformer2DModel"):
        raise BadFileError(f"{where} holds a {description.get('_class_name')!r}; a {CLASS} is wanted.")
    for key, value in FIXED.items():
        if description.get(key, value) != value:
            raise BadFileError(f"{where}: {key} is {description[key]!r}; a DiT has {value!r}.")
    try:
        heads, head = int(description["num_attention_heads"]), int(description["attention_head_dim"])
        channels = int(description["in_channels"])
        outputs = int(description.get("out_channels") or channels)
        if outputs not in (channels, 2 * channels):
            raise BadFileError(
                f"{where} predicts {outputs} channels of {channels}; a DiT once or twice as many."
            )
        return DiTConfig(
            input_size=int(description["sample_size"]), channels=channels,
            num_classes=int(description["num_embeds_ada_norm"]), width=heads * head,
            depth=int(description["num_layers"]), heads=heads, patch=int(description["patch_size"]),
            objective="epsilon" if outputs == 2 * channels else "flow", time_features=time_features,
            mlp_norm_eps=float(description.get("norm_eps", 1e-5)),
        )  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        fault = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise BadFileError(f"{where}: config.json describes no DiT: {fault}") from None


def _shapes(config: DiTConfig) -> dict[str, tuple[int, ...]]:
    """diffusers' names and shapes."""
    width, hidden, patch = config.width, 4 * config.width, config.patch
    layers = {
        "proj_out_1": (2 * width, width),
        "proj_out_2": (patch**2 * config.out_channels, width),
    }
    tables: dict[str, tuple[int, ...]] = {}
    for i in range(config.depth):
        block = f"transformer_blocks.{i}"
        layers |= {f"{block}.{name}": (width, width) for mine, name in BLOCK_NAMES.items() if mine in "qkvo"}
        layers |= {
            f"{block}.norm1.linear": (6 * width, width),
            f"{block}.ff.net.0.proj": (hidden, width),
            f"{block}.ff.net.2": (width, hidden),
            f"{block}.norm1.emb.timestep_embedder.linear_1": (width, FREQUENCIES),
            f"{block}.norm1.emb.timestep_embedder.linear_2": (width, width),
        }
        tables[f"{block}.norm1.emb.class_embedder.embedding_table.weight"] = (config.num_classes + 1, width)
    shapes = tables | {"pos_embed.proj.weight": (width, config.channels, patch, patch)}
    shapes["pos_embed.proj.bias"] = (width,)
    for name, shape in layers.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes
