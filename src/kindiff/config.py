"""Frozen, typed configs (standard library only) and the strict reader of recipes.

Every field's docstring is its help text on the command line. A part receives its own config, never the whole.
"""

from __future__ import annotations

import dataclasses
import json
import tomllib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from kindiff.classes import nearest
from kindiff.errors import UsageError

T = TypeVar("T")

# width, depth, heads of the published DiT sizes (Peebles & Xie 2023, table 1), and T for tests.
DIT_SIZES = {
    "T": (64, 2, 2),
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "XL": (1152, 28, 16),
}

MATRICES = ("q", "k", "v", "o", "mlp_in", "mlp_out")
"""The factored matrices of a block, KIND's {q, k, v, o, in, out}."""


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

    def __post_init__(self) -> None:
        for name in ("input_size", "channels", "num_classes", "width", "depth", "heads", "patch"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.input_size % self.patch:
            raise UsageError(
                f"input size {self.input_size} is not a multiple of the patch {self.patch}; choose a patch that "
                "divides it."
            )
        if self.width % self.heads or self.width % 4:
            raise UsageError(f"width {self.width} must be a multiple of 4 and of the {self.heads} heads.")

    @property
    def tokens(self) -> int:
        return (self.input_size // self.patch) ** 2

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

    def build(
        self,
        *,
        input_size: int,
        channels: int,
        num_classes: int,
        objective: Literal["flow", "epsilon"] = "flow",
        schedule: Literal["linear", "cosine"] = "linear",
        autoencoder: str = "",
    ) -> DiTConfig:
        """The whole DiTConfig, once the data is known."""
        width, depth, heads, patch = (
            _parse_preset(self.preset) if self.preset else (self.width, self.depth, self.heads, self.patch)
        )
        return DiTConfig(
            input_size=input_size, channels=channels, num_classes=num_classes, width=width, depth=depth,
            heads=heads, patch=patch, objective=objective, schedule=schedule, autoencoder=autoencoder,
            time_features=self.time_features,
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
    init: Literal["svd", "svd-rescaled", "per-factor"] = "svd"
    """Start of the components: the SVD of the dense weight, the same scaled up for the part that the gate
    switches off, or random factors (see docs/method.md for the measured choice)."""
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
class ObjectiveConfig:
    """What the model learns to predict."""

    kind: Literal["flow", "epsilon"] = "flow"
    """flow: rectified flow (velocity). epsilon: DiT's own, the noise with a learned range of variances."""
    schedule: Literal["linear", "cosine"] = "linear"
    """Noise schedule of the epsilon objective."""
    label_dropout: float = 0.1
    """Share of samples trained as the null class (for classifier-free guidance); tailors are off there."""
    gate_dropout: float = 0.2
    """Share of samples whose tailors are off while their class embedding stays on."""

    def __post_init__(self) -> None:
        for name in ("label_dropout", "gate_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be in [0, 1).")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images."""

    source: str = "avatars:base"
    """avatars:base, avatars:novel or avatars:all; a folder with one sub-folder a class; or a prepared folder
    (made by an earlier run or by `kindiff encode`)."""
    size: int = 32
    """Side in pixels; images are scaled and centre-cropped to it."""
    classes: tuple[str, ...] = ()
    """Only these classes, in this order; empty for all."""
    per_class: int = 0
    """At most this many images a class, the first ones; 0 for all (avatars: 400)."""
    groups: str = ""
    """Merge classes into groups that then are the classes: `imagenet` (611 groups), `avatars`, or a JSON file
    made by `kindiff classes`."""
    split: str = ""
    """Only the groups of this list of the groups file, such as base, novel or novel-10; empty for all."""
    flip: bool = True
    """Mirror a random half of the samples."""
    strict: bool = False
    """Stop at an unreadable image instead of naming, counting and skipping it."""

    def __post_init__(self) -> None:
        if self.split and not self.groups:
            raise UsageError(f"split {self.split!r} is a list of groups; say which with groups.")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The loop."""

    steps: int = 2000
    """Optimiser steps."""
    batch: int = 64
    """Images a step."""
    lr: float = 1e-3
    """Peak learning rate of the dense parameters and the learngenes."""
    tailor_lr: float = 0.0
    """Peak learning rate of the tailors; 0 for the same as lr."""
    warmup: int = 100
    """Steps of linear warm-up."""
    decay: float = 0.3
    """Last share of the steps over which the learning rate falls linearly to zero; 0 for a constant rate."""
    weight_decay: float = 0.0
    """Decoupled weight decay of the dense matrices; components, biases and embeddings have none."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    ema: float = 0.999
    """Decay of the exponential moving average a step; its start is faster."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Arithmetic of the matrix products; parameters, norms, sigma and gates stay fp32."""
    seed: int = 0
    """Seed of the initial weights, the order, the noise."""
    workers: int = 0
    """Loader processes; results do not depend on it."""
    save_every: int = 500
    """Steps between checkpoints."""
    log_every: int = 20
    """Steps between lines of metrics.jsonl."""
    device: str = "auto"
    """auto (a GPU when there is one), cpu, cuda, cuda:1."""
    tensorboard: bool = False
    """Write TensorBoard events too (extra: tensorboard)."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "save_every", "log_every"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if not self.lr > 0:
            raise UsageError(f"lr is {self.lr}; it must be above 0.")
        if not 0 <= self.decay <= 1:
            raise UsageError(f"decay is {self.decay}; it is a share of the steps, 0 to 1.")


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """How images are drawn."""

    sampler: Literal["auto", "euler", "heun", "ddim", "ddpm"] = "auto"
    """auto: heun for flow models, ddim for epsilon models."""
    steps: int = 25
    """Sampling steps."""
    spacing: Literal["even", "trailing"] = "even"
    """Timesteps of ddim and ddpm: even, from 0 to 999 as published; trailing, whole strides down from 999, as the
    schedulers of exported pipelines have them."""
    guidance: float = 1.5
    """Classifier-free guidance scale; 1 for none. The learngenes alone are the unconditional model."""
    seed: int = 0
    """Image i is a function of (seed, i) and its class alone."""
    batch: int = 64
    """Images drawn at once."""
    precision: Literal["bf16", "fp32"] = "fp32"
    """Arithmetic of the matrix products."""
    device: str = "auto"
    """auto (a GPU when there is one), cpu, cuda, cuda:1."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be at least 1.")


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
class EncodeConfig:
    """Images to latents, with an autoencoder that is there or trained first."""

    data: DataConfig = field(default_factory=lambda: DataConfig(size=64))
    autoencoder: str = ""
    """Directory of a trained autoencoder; empty to train one on these images."""
    model: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    """Shape of the autoencoder to train."""
    steps: int = 1500
    """Optimiser steps of its training."""
    batch: int = 32
    """Images a step, and images encoded at once."""
    lr: float = 2e-3
    """Peak learning rate; falls to zero along a cosine."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Arithmetic of its training; encoding is fp32."""
    seed: int = 0
    """Seed of the weights, the order and the noise."""
    device: str = "auto"
    """auto (a GPU when there is one), cpu, cuda, cuda:1."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be at least 1.")


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """One pre-training run: data, backbone, split, objective, loop."""

    data: DataConfig = field(default_factory=DataConfig)
    model: BackboneConfig = field(default_factory=BackboneConfig)
    method: Literal["kind", "dense"] = "kind"
    """kind: a decomposable model. dense: the same backbone with plain matrices (the rivals' start)."""
    init: str = ""
    """Start from the weights of this model or components directory, of the same shape; empty for random ones."""
    superclasses: str = ""
    """Superclass of each class, for kind.gate superclass: `avatars`, or a JSON file made by `kindiff classes`."""
    kind: KindConfig = field(default_factory=lambda: KindConfig(learngene_rank=64, tailor_rank=2))
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        wanted = self.method == "kind" and self.kind.gate == "superclass"
        if wanted != bool(self.superclasses):
            raise UsageError(
                f"superclasses is {self.superclasses!r} with gate {self.kind.gate!r} and method {self.method!r}; "
                "superclasses go with method kind and kind.gate superclass, and only with them."
            )


@dataclass(frozen=True, kw_only=True)
class TransferConfig:
    """Learning new classes: learngenes frozen, fresh tailors."""

    data: DataConfig = field(default_factory=lambda: DataConfig(source="avatars:novel", per_class=50))
    rank: int = 2
    """N_T of the fresh tailors."""
    share: Literal["class", "task"] = "class"
    """class: a tailor for each new class. task: one tailor that all new classes share."""
    init: Literal["fresh", "nearest"] = "fresh"
    """fresh: u at zero, v random. nearest: a copy of the pre-trained tailor that fits the class best."""
    targets: tuple[str, ...] = MATRICES
    """The matrices that get fresh tailors."""
    train_also: tuple[Literal["bias", "final"], ...] = ()
    """Learngene parts that train too: the biases of the factored matrices, the final layer."""
    train: TrainConfig = field(default_factory=lambda: TrainConfig(steps=500, lr=4e-3, save_every=250))


def from_dict(cls: type[T], values: Any, *, where: str = "") -> T:
    """A config from plain values (parsed TOML or JSON); raises UsageError that names the key.

    Unknown keys, wrong types and missing required fields are errors; fields' own checks run too.
    """
    if not isinstance(values, dict):
        raise UsageError(f"{where or cls.__name__} must be a table of keys, not {values!r}.")
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            raise UsageError(
                f"unknown key {f'{where}.{key}' if where else key!r}{nearest(key, known)}; "
                f"{cls.__name__} has: {', '.join(known)}."
            )
    built = {
        key: _convert(hints[key], value, f"{where}.{key}" if where else key) for key, value in values.items()
    }
    required = (
        name
        for name, f in known.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    )
    missing = [name for name in required if name not in built]
    if missing:
        raise UsageError(f"{where or cls.__name__} lacks the required key {missing[0]!r}.")
    return cls(**built)


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin = typing.get_origin(hint)
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(type, hint), value, where=where)
    if origin in (types.UnionType, typing.Union):
        options = typing.get_args(hint)
        if value is None and type(None) in options:
            return None
        return _convert(next(o for o in options if o is not type(None)), value, where)
    if origin is Literal:
        allowed = typing.get_args(hint)
        if value not in allowed:
            raise UsageError(f"{where} is {value!r}{nearest(str(value), allowed)}; it is one of {allowed}.")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise UsageError(f"{where} is {value!r}; it must be a list.")
        element = typing.get_args(hint)[0]
        return tuple(_convert(element, v, f"{where}[{i}]") for i, v in enumerate(value))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise UsageError(f"{where} is {value!r}; it must be of type {hint.__name__}.")
    return value


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain values, ready for JSON; `from_dict` is its inverse."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def load_recipe(path: Path, cls: type[T]) -> T:
    """A recipe (TOML) as a config of type cls; UsageError names the file and the key."""
    try:
        with path.open("rb") as file:
            values = tomllib.load(file)
    except FileNotFoundError:
        raise FileNotFoundError(f"recipe {path} does not exist.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"recipe {path} is not valid TOML: {error}.") from None
    try:
        return from_dict(cls, values)
    except UsageError as error:
        raise UsageError(f"recipe {path}: {error}") from None
