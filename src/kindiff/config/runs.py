"""What a run does: data, objective, loop, sampling, and whole recipes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from kindiff.config.shapes import MATRICES, AutoencoderConfig, BackboneConfig, KindConfig, Share
from kindiff.errors import UsageError

Precision = Literal["auto", "bf16", "fp32"]


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What the model learns to predict."""

    kind: Literal["flow", "epsilon"] = "flow"
    """flow: rectified flow (velocity). epsilon: DiT's own, the noise with a learned range of variances."""
    schedule: Literal["linear", "cosine"] = "linear"
    """Noise schedule of the epsilon objective."""
    label_dropout: float = 0.1
    """Share of samples trained as the null class (for classifier-free guidance)."""
    null_gate: Literal["off", "class"] = "off"
    """What the gate sees without a label, in training and in guidance's null pass. off: nothing, so the learngenes are
    the unconditional model. class (an ablation): the class, whose tailor stays on."""
    gate_dropout: float = 0.2
    """Share of samples whose tailors are off while their class embedding stays on."""
    gate_labels: Literal["class", "shuffled"] = "class"
    """Which tailor is on: the class's, or (a control that diverts nothing) one drawn at random for each sample."""

    def __post_init__(self) -> None:
        for name in ("label_dropout", "gate_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be in [0, 1).")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images."""

    source: str = "avatars:base"
    """avatars:base, avatars:novel or avatars:all; a folder with one sub-folder a class; a Hugging Face data set
    (hf:NAME, hf:NAME:SPLIT, or a directory that save_to_disk wrote); or a prepared folder (made by an earlier run or
    by `kindiff encode`)."""
    size: int = 32
    """Side in pixels; images are scaled and centre-cropped to it."""
    classes: tuple[str, ...] = ()
    """Only these classes, in this order; empty for all."""
    per_class: int = 0
    """At most this many images a class, the first ones; 0 for all (avatars: 400)."""
    first: int = 0
    """Leave out so many images of each class before those: held-out images are the later ones."""
    groups: str = ""
    """Merge classes into groups that then are the classes: `imagenet` (611 groups), `avatars`, or a JSON file
    made by `kindiff classes`."""
    split: str = ""
    """Only the groups of this list of the groups file, such as base, novel or novel-10; empty for all."""
    flip: bool = True
    """Mirror a random half of the samples."""
    latent_shape: tuple[int, ...] = ()
    """The source must hold latents of these channels and this side, such as 4 32; empty for whatever it holds."""
    strict: bool = False
    """Stop at an unreadable image instead of naming, counting and skipping it."""

    def __post_init__(self) -> None:
        if self.per_class < 0 or self.first < 0:
            raise UsageError(
                f"per_class is {self.per_class} and first is {self.first}; both must be 0 or more."
            )
        if self.split and not self.groups:
            raise UsageError(f"split {self.split!r} is a list of groups; say which with groups.")
        if self.first and self.groups:
            raise UsageError(f"first is {self.first}, but images of merged groups are taken from the start.")
        if self.latent_shape and (len(self.latent_shape) != 2 or min(self.latent_shape) < 1):
            raise UsageError(f"latent_shape is {self.latent_shape}; it is channels and side, such as 4 32.")

    @property
    def of_class(self) -> slice:
        """Which of a class's images: per_class ones from `first` on, or all from there."""
        return slice(self.first, self.first + self.per_class if self.per_class else None)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The loop."""

    steps: int = 2000
    """Optimiser steps."""
    batch: int = 64
    """Images a step, over all ranks."""
    accumulate: int = 1
    """Parts of a rank's images that go through the model one after the other, for less memory."""
    recompute: bool = False
    """Compute the blocks' activations again in the backward pass instead of keeping them, for less memory."""
    compile: bool = False
    """Compile the blocks (torch.compile): one graph for all, whatever the classes of a batch; needs a C++ compiler."""
    record: bool = False
    """On one GPU, after the first steps: record a step as CUDA graphs and replay it, which costs the host next to
    nothing; without effect elsewhere."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Under torchrun. ddp: every rank holds the whole model. fsdp: a piece of every tensor (FSDP2)."""
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
    precision: Precision = "auto"
    """Arithmetic of the matrix products; parameters, norms, sigma and what a gate says stay fp32. auto: bf16 where the
    device multiplies it in hardware, else fp32."""
    seed: int = 0
    """Seed of the initial weights, the order, the noise."""
    workers: int = 0
    """Loader processes; results do not depend on it."""
    save_every: int = 500
    """Most steps that a kill can cost; a checkpoint is begun every half of it."""
    checkpoints: Literal["full", "sharded"] = "full"
    """full: the first rank writes whole tensors. sharded: each rank its pieces. Any number of ranks reads both."""
    log_every: int = 20
    """Steps between lines of metrics.jsonl."""
    rollbacks: int = 3
    """How often a run may go back to its newest checkpoint because a number was not finite; then it stops."""
    skip_window: int = 10
    """Steps, from the one at fault on, that are left out for good after going back."""
    device: str = "auto"
    """auto (a GPU when there is one), cpu, cuda, cuda:1."""
    tensorboard: bool = False
    """Write TensorBoard events too (extra: tensorboard)."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "accumulate", "save_every", "log_every"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.batch % self.accumulate:
            raise UsageError(
                f"a batch of {self.batch} does not divide into {self.accumulate} parts; make it a multiple."
            )
        if self.rollbacks < 0 or self.skip_window < 1:
            raise UsageError(
                f"rollbacks is {self.rollbacks} and skip_window is {self.skip_window}; they are 0 or more, 1 or more."
            )
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
    precision: Precision = "fp32"
    """Arithmetic of the matrix products; auto as in training."""
    device: str = "auto"
    """auto (a GPU when there is one), cpu, cuda, cuda:1."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be at least 1.")


@dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    """Images to latents, with an autoencoder that is there or trained first."""

    data: DataConfig = field(default_factory=lambda: DataConfig(size=64))
    names: str = ""
    """Other names for the classes, by number: imagenet (its folder names, which groups need) or a text file, one a
    line."""
    autoencoder: str = ""
    """The autoencoder: a directory of ours, a diffusers folder (AutoencoderKL, or a pipeline with one) or a name on
    the hub such as stabilityai/sd-vae-ft-ema; empty to train a small one on these images."""
    model: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    """Shape of the autoencoder to train."""
    steps: int = 1500
    """Optimiser steps of its training."""
    batch: int = 32
    """Images a step, and images encoded at once."""
    lr: float = 2e-3
    """Peak learning rate; falls to zero along a cosine."""
    precision: Precision = "auto"
    """Arithmetic of its training, auto as there; encoding is fp32."""
    seed: int = 0
    """Seed of the weights, the order and the noise."""
    dtype: Literal["float32", "float16"] = "float32"
    """Numbers in the files; float16 halves them."""
    per_shard: int = 256
    """Images of a file; an interruption costs the files that were being made."""
    workers: int = 0
    """Processes that read and encode; the result does not depend on it. 0: one a core, or four on a GPU."""
    device: str = "auto"
    """auto (a GPU when there is one), cpu, cuda, cuda:1."""

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise UsageError(f"workers is {self.workers}; it must be 0 or more.")
        for name in ("steps", "batch", "per_shard"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be at least 1.")


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """One pre-training run: data, backbone, split, objective, loop."""

    data: DataConfig = field(default_factory=DataConfig)
    model: BackboneConfig = field(default_factory=BackboneConfig)
    method: Literal["kind", "dense", "tleg", "fine", "wave"] = "kind"
    """kind: a decomposable model. dense: the same backbone with plain matrices (the rivals' start). tleg, fine, wave:
    blocks under the constraint of another learngene method (docs/rivals.md), written out dense."""
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
        if self.method != "kind" and self.objective.null_gate != "off":
            raise UsageError(
                f"objective.null_gate needs tailors, which method {self.method} has not; leave it out."
            )
        gate = self.kind.gate if self.method == "kind" else ""
        if self.objective.gate_labels == "shuffled" and gate not in ("class", "superclass"):
            raise UsageError(
                "objective.gate_labels shuffled needs method kind with a gate by class; leave it out."
            )
        if self.objective.null_gate == "class" and gate == "soft":
            raise UsageError(
                "objective.null_gate class needs a gate by class: the soft gate sees the null embedding; leave it out."
            )
        if self.init and self.method not in ("kind", "dense"):
            raise UsageError(
                f"init is {self.init!r} and method {self.method} starts from random weights; leave it out."
            )


@dataclass(frozen=True, kw_only=True)
class TransferConfig:
    """Learning new classes: learngenes frozen, fresh tailors."""

    data: DataConfig = field(default_factory=lambda: DataConfig(source="avatars:novel"))
    rank: int = 2
    """N_T of the new tailors."""
    share: Share = "class"
    """class: a tailor for each new class. task: one tailor that all new classes share. both: one of each, both on."""
    init: Literal["fresh", "nearest"] = "fresh"
    """fresh: u at zero, v random. nearest: a copy of the pre-trained tailor that fits the class best."""
    trains: Literal["components", "mixture"] = "components"
    """components: u, sigma and v of the tailors. mixture: each class learns how much of each of the nearest tailors it
    has in each matrix, and of the embeddings, and at the end the sum is cut to `rank` components (init nearest)."""
    mixes: int = 8
    """mixture: how many of the pre-trained tailors, those that fit it best, a class mixes."""
    targets: tuple[str, ...] = MATRICES
    """The matrices that get fresh tailors."""
    train_also: tuple[Literal["bias", "final"], ...] = ()
    """Learngene parts that train too: the biases of the factored matrices, the final layer. Guidance's null pass, which
    is the learngenes alone and is not trained here, fits less well then."""
    train: TrainConfig = field(default_factory=lambda: TrainConfig(steps=500, lr=4e-3, save_every=250))

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UsageError(f"rank is {self.rank}; it must be at least 1.")
        if self.trains == "mixture" and ((self.init, self.share) != ("nearest", "class") or self.mixes < 1):
            asked = f"{self.init}, {self.share} and {self.mixes}"
            raise UsageError(
                f"trains mixture needs init nearest, share class and mixes of 1 or more, not {asked}."
            )
        if self.init == "nearest" and self.share == "task":
            raise UsageError("init nearest copies a tailor for each class; set share class, or init fresh.")
