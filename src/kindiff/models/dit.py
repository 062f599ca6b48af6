"""The diffusion transformer, after "Scalable Diffusion Models with Transformers" (Peebles & Xie 2023).

B batch, C channels, H/W side of the input, T tokens, D width, P patch side.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from kindiff import checkpoint
from kindiff.classes import ClassSet, numbered
from kindiff.config import MATRICES, DiTConfig, from_dict, to_dict
from kindiff.errors import BadFileError, UsageError
from kindiff.models.layers import (
    Gating,
    Linear,
    activate,
    add_gated,
    attend,
    conditions,
    modulate,
    position_table,
    project,
    timestep_features,
)

FREQUENCIES = 256  # features of the timestep before its MLP, as published

MakeLinear = Callable[[str, int, int], nn.Module]
"""(matrix name, features in, features out) -> a layer that is called as layer(x, gating)."""


def dense_linear(matrix: str, features_in: int, features_out: int) -> nn.Module:
    """The plain choice of matrix: dense."""
    return Linear(features_in, features_out)


class DiT(nn.Module):
    """A class-conditional diffusion transformer with adaLN-zero blocks.

    `linear` makes the six matrices of every block and `gate` turns class ids into a Gating for them; with the
    defaults the model is the published dense DiT.
    """

    positions_TD: Tensor

    def __init__(
        self,
        config: DiTConfig,
        *,
        classes: ClassSet | None = None,
        linear: MakeLinear = dense_linear,
        gate: nn.Module | None = None,
        structure: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.structure = structure  # how `linear` and `gate` are made again on loading; None for dense
        self.classes = classes or numbered(config.num_classes)
        if len(self.classes) != config.num_classes:
            raise UsageError(
                f"the config says {config.num_classes} classes but {len(self.classes)} are named; make them equal."
            )
        self.gate = gate
        self.recompute = False  # in training: blocks compute their activations again instead of keeping them
        self.patch_embed = nn.Linear(config.channels * config.patch**2, config.width)
        self.register_buffer("positions_TD", torch.empty(0), persistent=False)
        self.set_positions_()
        self.time_embed = nn.Sequential(
            nn.Linear(FREQUENCIES, config.width), nn.SiLU(), nn.Linear(config.width, config.width)
        )
        self.class_embed = nn.Embedding(self.classes.rows, config.width)
        self.blocks = nn.ModuleList(Block(config, linear) for _ in range(config.depth))
        self.final = FinalLayer(config)
        initialise_(self)

    def forward(
        self,
        x_BCHW: Tensor,
        t_B: Tensor,
        ids_B: Tensor,
        gate_ids_B: Tensor | None = None,
        gating: Gating | None = None,
    ) -> Tensor:
        """Predict from noisy inputs: (B, out_channels, H, W), in the inputs' dtype.

        t_B timesteps in [0, 1000]; ids_B class ids, the null id for no class. The gate sees gate_ids_B where
        given (gate dropout in training), else the same ids as the embedding. gating: what it says of them, where
        `gating` has asked it already.
        """
        x_BTD = self.patch_embed(patchify(x_BCHW, self.config.patch)) + self.positions_TD
        e_BD = self.class_embed(ids_B)
        last = self.config.time_features == "diffusers"
        c_BD = self.time_embed(timestep_features(t_B, FREQUENCIES, reach_last=last).to(e_BD.dtype)) + e_BD
        if self.gate is not None and gating is None:
            gating = self.gate(ids_B if gate_ids_B is None else gate_ids_B, e_BD)
        c_BD = F.silu(c_BD)
        for block in self.blocks:
            if self.recompute and torch.is_grad_enabled():
                x_BTD = recomputed(block, x_BTD, c_BD, gating, use_reentrant=False, preserve_rng_state=False)
            else:
                x_BTD = block(x_BTD, c_BD, gating)
        return unpatchify(
            self.final(x_BTD, c_BD).to(x_BCHW.dtype), self.config.patch, self.config.out_channels
        )

    @torch.no_grad()
    def gating(self, ids_B: Tensor, gate_ids_B: Tensor | None = None) -> Gating | None:
        """What the gate says of a batch, for all calls with these ids that a sampler makes; None without a gate.

        Component matrices round and gather their factors once for all of these calls, so the weights must stay as
        they are meanwhile, and the arithmetic; samples at the end that have no tailor (guidance's null pass) cost none.
        """
        if self.gate is None:
            return None
        gating: Gating = self.gate(ids_B if gate_ids_B is None else gate_ids_B, self.class_embed(ids_B))
        on = gating.weights_BK.any(dim=1).nonzero()
        return gating._replace(on=int(on[-1]) + 1 if len(on) else 0, kept={})

    def set_positions_(self) -> None:
        """Make the table of positions, which no file holds: for a model that was built without memory."""
        self.positions_TD = position_table(self.config.width, self.config.input_size // self.config.patch)

    def named_matrices(self) -> list[tuple[str, nn.Module]]:
        """The six matrices of every block with their full names, in order."""
        return [
            (f"blocks.{i}.{matrix}", getattr(block, matrix))
            for i, block in enumerate(self.blocks)
            for matrix in MATRICES
        ]

    def save_pretrained(self, directory: str | Path) -> None:
        """Write config.json and model.safetensors; the directory appears whole or not at all."""
        with checkpoint.new_directory(Path(directory)) as folder:
            self.write_files(folder)

    def write_files(self, folder: Path) -> None:
        """The two files of a model, into a folder that exists."""
        description = {
            "format": checkpoint.FORMAT,
            "kind": "model",
            "model": to_dict(self.config),
            "classes": list(self.classes.names),
            "structure": self.structure,
            "weights": checkpoint.hash_tensors(self.state_dict()),
        }
        checkpoint.write_json(folder / "config.json", description)
        checkpoint.write_tensors(folder / "model.safetensors", self.state_dict())

    @staticmethod
    def from_pretrained(directory: str | Path, *, wrap: Callable[[DiT], DiT] | None = None) -> DiT:
        """Read what save_pretrained wrote, dense or made of components.

        wrap: makes of a plain model one with the layers that the saved one had, where another library had put them in.
        Raises FileNotFoundError, or BadFileError naming the file that is damaged or of another architecture.
        """
        folder = Path(directory)
        description = checkpoint.read_description(
            folder,
            "model",
            wanted=f"a model of format {checkpoint.FORMAT} is wanted (`kindiff recombine` makes one of parts)",
        )
        try:
            config = from_dict(DiTConfig, description.get("model"))
            classes = ClassSet(tuple(description.get("classes") or ()))
            checkpoint.check_depth(folder / "model.safetensors", config.depth)
            with torch.device("meta" if wrap is None else "cpu"):
                model = _build(config, classes, description.get("structure"))
            model = model if wrap is None else wrap(model)
        except (UsageError, TypeError) as error:
            raise BadFileError(f"{folder / 'config.json'} is damaged: {error}") from None
        tensors = checkpoint.read_tensors(folder / "model.safetensors")
        checkpoint.check_tensors(folder / "model.safetensors", tensors, model.state_dict())
        checkpoint.check_hash(folder / "model.safetensors", tensors, description.get("weights"))
        model.load_state_dict(tensors, assign=True)
        model.set_positions_()
        return model.requires_grad_(True)


def _build(config: DiTConfig, classes: ClassSet, structure: dict[str, Any] | None) -> DiT:
    """An empty model to load into. A structure is made by the room above, bound late: see architecture.md."""
    if structure is None:
        return DiT(config, classes=classes)
    return importlib.import_module("kindiff.components.build").build(config, classes, structure)


class Block(nn.Module):
    """Attention and MLP, each between an adaptive norm and a zero-initialised gate (adaLN-zero)."""

    q: nn.Module
    k: nn.Module
    v: nn.Module
    o: nn.Module
    mlp_in: nn.Module
    mlp_out: nn.Module

    def __init__(self, config: DiTConfig, linear: MakeLinear) -> None:
        super().__init__()
        self.heads = config.heads
        for matrix in MATRICES:
            features_out, features_in = config.matrix_shape(matrix)
            self.add_module(matrix, linear(matrix, features_in, features_out))
        self.norm_attention = nn.LayerNorm(config.width, eps=1e-6, elementwise_affine=False)
        self.norm_mlp = nn.LayerNorm(config.width, eps=config.mlp_norm_eps, elementwise_affine=False)
        self.modulation = nn.Linear(config.width, 6 * config.width)

    def forward(self, x_BTD: Tensor, c_BD: Tensor, gating: Gating | None) -> Tensor:
        parts = conditions(self.modulation(c_BD), x_BTD, 6)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = parts
        h_BTD = modulate(self.norm_attention, x_BTD, shift_a, scale_a)
        x_BTD = add_gated(x_BTD, gate_a, self.attention(h_BTD, gating))
        h_BTD = modulate(self.norm_mlp, x_BTD, shift_m, scale_m)
        hidden = activate(self.mlp_in, h_BTD, gating)
        return add_gated(x_BTD, gate_m, self.mlp_out(hidden, gating))

    def attention(self, x_BTD: Tensor, gating: Gating | None) -> Tensor:
        q, k, v = project((self.q, self.k, self.v), x_BTD, gating)
        return self.o(attend(q, k, v, self.heads), gating)


class FinalLayer(nn.Module):
    """Adaptive norm and the projection back to patches."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.width, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Linear(config.width, 2 * config.width)
        self.out = nn.Linear(config.width, config.patch**2 * config.out_channels)

    def forward(self, x_BTD: Tensor, c_BD: Tensor) -> Tensor:
        shift, scale = conditions(self.modulation(c_BD), x_BTD, 2)
        return self.out(modulate(self.norm, x_BTD, shift, scale))


def patchify(x_BCHW: Tensor, patch: int) -> Tensor:
    """(B, C, H, W) -> (B, T, C P P), patches row by row."""
    return F.pixel_unshuffle(x_BCHW, patch).flatten(2).transpose(1, 2)


def unpatchify(x_BTF: Tensor, patch: int, channels: int) -> Tensor:
    """(B, T, P P C) with the channel last, as published, -> (B, C, H, W)."""
    batch, tokens, _ = x_BTF.shape
    side = int(tokens**0.5)
    grid = x_BTF.reshape(batch, side, side, patch, patch, channels)
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(batch, channels, side * patch, side * patch)


@torch.no_grad()
def initialise_(model: DiT) -> None:
    """The published initialisation: Xavier matrices, small embeddings, zero modulations and output."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.normal_(model.class_embed.weight, std=0.02)
    for name, parameter in model.named_parameters():
        if name.startswith("time_embed.") and name.endswith(".weight"):
            nn.init.normal_(parameter, std=0.02)
        if name.endswith("modulation.weight"):
            nn.init.zeros_(parameter)
    nn.init.zeros_(model.final.out.weight)
