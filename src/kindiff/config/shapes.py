"""Shapes of models: the transformer, its factored matrices, the small autoencoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kindiff.classes import nearest
from kindiff.errors import UsageError

# width, depth, heads of the published DiT sizes (Peebles & Xie 2023, table 1), and T for tests.
DIT_SIZES = {
    "T": (64, 2, 2),
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "XL": (1152, 28, 16),
}

# Above any model there is; a description from elsewhere that claims more is refused before anything is made.
LARGEST = {
    "input_size": 2**13, "channels": 2**10, "num_classes": 2**20, "width": 2**14, "depth": 2**9, "heads": 2**10,
    "patch": 2**10,
}  # fmt: skip
MAX_TOKENS = 2**14

MATRICES = ("q", "k", "v", "o", "mlp_in", "mlp_out")
"""The factored matrices of a block, KIND's {q, k, v, o, in, out}."""


Share = Literal["class", "task", "both"]
"""Who has a fresh tailor at transfer: each class, the task as a whole, or each class and the task."""


@dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """Shape of a diffusion transformer."""

    input_size: int
    """Side of the square input (pixels, or latent cells)."""
    channels: int
    """Channels of the input: 3 for pixels, the autoencoder's for latents."""
    num_classes: int
    """Real classes; the embedding has one more row, the null class."""
    width: int
    """Width of the tokens."""
    depth: int
    """Number of blocks."""
    heads: int
    """Attention heads."""
    patch: int
    """Side of a patch, in input cells."""
    mlp_ratio: float = 4.0
    """Hidden width of the MLP over the width."""
    objective: Literal["flow", "epsilon"] = "flow"
    """What the output is: flow, the velocity; epsilon, the noise and a second half that sets the variance."""
    schedule: Literal["linear", "cosine"] = "linear"
    """Noise schedule of an epsilon model."""
    autoencoder: str = ""
    """SHA-256 of the autoencoder whose latents the model works on; empty for pixels."""
    time_features: Literal["published", "diffusers"] = "published"
    """Frequencies of the timestep's features: published, 10000^(-i/128); diffusers, 10000^(-i/127), which
    diffusers' own DiT uses instead."""
    mlp_norm_eps: float = 1e-6
    """Epsilon of the norm before the MLP: 1e-6 as published; diffusers' DiT has 1e-5 unless told otherwise."""
    null_gate: Literal["off", "class"] = "off"
    """What the gate sees in guidance's null pass: nothing, or the class (ObjectiveConfig)."""

    def __post_init__(self) -> None:
        for name, largest in LARGEST.items():
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be at least 1.")
            if getattr(self, name) > largest:
                raise UsageError(f"{name} is {getattr(self, name)}; models have at most {largest}.")
        if not 0 < self.mlp_ratio <= 64 or self.width * self.mlp_ratio < 1:
            raise UsageError(f"mlp_ratio is {self.mlp_ratio}; it must be above 0 and at most 64.")
        if self.input_size % self.patch:
            raise UsageError(
                f"input size {self.input_size} is not a multiple of the patch {self.patch}; choose a patch that "
                "divides it."
            )
        if self.width % self.heads or self.width % 4:
            raise UsageError(f"width {self.width} must be a multiple of 4 and of the {self.heads} heads.")
        if self.tokens > MAX_TOKENS:
            raise UsageError(f"{self.tokens} tokens are more than {MAX_TOKENS}; take a larger patch.")

    @property
    def tokens(self) -> int:
        return (self.input_size // self.patch) ** 2

    @property
    def on_latents(self) -> bool:
        """Whether the input is latents: a model from a released file names no autoencoder, and its channels tell."""
        return bool(self.autoencoder) or self.channels != 3

    @property
    def hidden(self) -> int:
        return int(self.width * self.mlp_ratio)

    @property
    def out_channels(self) -> int:
        return self.channels * 2 if self.objective == "epsilon" else self.channels

    def matrix_shape(self, matrix: str) -> tuple[int, int]:
        """(features out, features in) of one of MATRICES."""
        return {"mlp_in": (self.hidden, self.width), "mlp_out": (self.width, self.hidden)}.get(
            matrix, (self.width, self.width)
        )

    @staticmethod
    def preset(
        name: str,
        *,
        num_classes: int,
        input_size: int = 32,
        channels: int = 4,
        objective: Literal["flow", "epsilon"] = "flow",
    ) -> DiTConfig:
        """A published size and patch, e.g. `DiT-L/2`. Sizes T, S, B, L, XL; patches 1, 2, 4, 8."""
        return BackboneConfig(preset=name).build(
            input_size=input_size, channels=channels, num_classes=num_classes, objective=objective
        )


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """The backbone's shape, without what the data decides (input size, channels, classes)."""

    preset: str = ""
    """A published size such as DiT-S/2; when given, the four numbers below are not used."""
    width: int = 192
    """Width of the tokens."""
    depth: int = 6
    """Number of blocks."""
    heads: int = 3
    """Attention heads."""
    patch: int = 4
    """Side of a patch."""
    time_features: Literal["published", "diffusers"] = "published"
    """Frequencies of the timestep's features; with diffusers', exported pipelines are exact at any step count."""
    mlp_norm_eps: float = 1e-6
    """Epsilon of the norm before the MLP; 1e-5 in diffusers' DiT unless told otherwise."""

    def build(
        self,
        *,
        input_size: int,
        channels: int,
        num_classes: int,
        objective: Literal["flow", "epsilon"] = "flow",
        schedule: Literal["linear", "cosine"] = "linear",
        autoencoder: str = "",
        null_gate: Literal["off", "class"] = "off",
    ) -> DiTConfig:
        """The whole DiTConfig, once the data is known."""
        width, depth, heads, patch = (
            _parse_preset(self.preset) if self.preset else (self.width, self.depth, self.heads, self.patch)
        )
        return DiTConfig(
            input_size=input_size, channels=channels, num_classes=num_classes, width=width, depth=depth,
            heads=heads, patch=patch, objective=objective, schedule=schedule, autoencoder=autoencoder,
            time_features=self.time_features, mlp_norm_eps=self.mlp_norm_eps, null_gate=null_gate,
        )  # fmt: skip


def _parse_preset(name: str) -> tuple[int, int, int, int]:
    size, _, patch = name.removeprefix("DiT-").partition("/")
    if not name.startswith("DiT-") or size not in DIT_SIZES or patch not in ("1", "2", "4", "8"):
        raise UsageError(
            f"preset {name!r} is unknown; use DiT-<{'|'.join(DIT_SIZES)}>/<1|2|4|8>, for example DiT-S/2."
        )
    return (*DIT_SIZES[size], int(patch))


@dataclass(frozen=True, kw_only=True)
class KindConfig:
    """How the weight matrices are split into learngenes and tailors."""

    learngene_rank: int
    """N_G: rank-1 components of every matrix that are always on."""
    tailor_rank: int
    """N_T: rank-1 components of every matrix that belong to one class."""
    init: Literal["auto", "svd", "svd-rescaled", "per-factor"] = "auto"
    """Start of the components: the SVD of the dense weight, the same scaled up for the part that the gate
    switches off, or random factors. auto: svd-rescaled for pre-training from random weights, where it measures best
    (docs/method.md); svd for a dense model that is there already, which it leaves as it is."""
    gate: Literal["class", "superclass", "soft"] = "class"
    """class: one tailor a class, on for its class only (KIND). superclass: two, the class's own and one that its
    superclass shares (needs superclasses). soft: one weight a tailor from an MLP on the class embedding
    (DivControl)."""
    targets: tuple[str, ...] = MATRICES
    """The matrices that get tailors; the others have learngenes only."""

    def __post_init__(self) -> None:
        if self.learngene_rank < 1:
            raise UsageError(f"learngene_rank is {self.learngene_rank}; it must be at least 1.")
        if self.tailor_rank < 0:
            raise UsageError(f"tailor_rank is {self.tailor_rank}; it must be 0 or more.")
        for target in self.targets:
            if target not in MATRICES:
                raise UsageError(
                    f"target {target!r} is no matrix of a block{nearest(target, MATRICES)}; use {MATRICES}."
                )


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """Shape of the small autoencoder: images to latents four times smaller a side."""

    channels: int = 4
    """Latent channels."""
    width: int = 32
    """Channels of its convolutions at half resolution; twice that at a quarter."""

    def __post_init__(self) -> None:
        if self.channels < 1 or self.width < 8 or self.width % 8 or max(self.channels, self.width) > 4096:
            raise UsageError(
                f"an autoencoder has 1 or more channels and a width that is a multiple of 8, not {self}."
            )


@dataclass(frozen=True, kw_only=True)
class DesignConfig:
    """A model to count, not to train: `kindiff inspect DESIGN.toml`."""

    model: BackboneConfig
    """The backbone."""
    input_size: int = 32
    """Side of the input: 32 for the latents of 256 px images."""
    channels: int = 4
    """Channels of the input."""
    classes: int = 1
    """Number of classes."""
    objective: Literal["flow", "epsilon"] = "epsilon"
    """What the output is; epsilon has twice the output channels."""
    learngene_rank: int = 0
    """N_G of every matrix; 0 for dense matrices."""
    tailor_rank: int = 0
    """N_T of every matrix."""
    share: Share = "class"
    """class: a tailor for each class. task: one tailor for all. both: one of each."""
    targets: tuple[str, ...] = MATRICES
    """The matrices that have tailors."""
    trains: Literal["all", "tailors"] = "all"
    """all: pre-training. tailors: transfer, with the learngenes frozen."""
    mixes: int = 0
    """A transfer that trains mixtures of so many known tailors of that rank, counted as it trains (TransferConfig)."""
    train_also: tuple[Literal["bias", "final"], ...] = ()
    """At transfer, learngene parts that train too."""

    def __post_init__(self) -> None:
        if min(self.learngene_rank, self.tailor_rank) < 0 or (self.tailor_rank and not self.learngene_rank):
            raise UsageError(
                f"learngene_rank {self.learngene_rank} and tailor_rank {self.tailor_rank} do not fit: both are 0 or "
                "more, and tailors need learngenes."
            )
        if self.mixes < 0 or (self.mixes and (not self.tailor_rank or self.trains != "tailors")):
            raise UsageError(
                f"mixes {self.mixes} does not fit; it is of tailors (tailor_rank) at transfer (trains tailors), or 0."
            )
