"""The protocol: everything a score depends on. Two scores are compared only under one protocol."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from kindiff.checkpoint import read_json
from kindiff.config import from_dict
from kindiff.errors import BadFileError, UsageError
from kindiff.runtime import versions

METRICS_VERSION = 2
"""Raised when a change of the metrics' code changes their values beyond docs/numerics.md."""

RECORDED_ONLY = ("samples", "samples_sha256", "seed", "versions")
"""Fields that say where a score comes from and may differ between two that are compared."""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How a score was made; None: not known (images that came without a record)."""

    features: str
    """Name of the feature network."""
    features_sha256: str
    """Hash of its weights."""
    resize: str
    """How an image becomes the network's input."""
    count: int
    """N, the number of samples."""
    size: tuple[int, ...]
    """Height and width of the samples."""
    encoding: str
    """What the samples' pixels went through: lossless, jpeg, webp or mixed."""
    classes: tuple[str, ...]
    """Names of the samples' classes; empty when not known."""
    reference: str
    """Name of the reference."""
    reference_sha256: str
    """Hash of what the reference was made from."""
    sampler: str | None = None
    """Sampler, with the spacing of its timesteps where there is a choice."""
    steps: int | None = None
    """Its steps."""
    guidance: float | None = None
    """Its guidance scale."""
    precision: str | None = None
    """Its arithmetic."""
    ema: bool | None = None
    """Whether the weights are the moving average of training."""
    metrics: int = METRICS_VERSION
    """Version of the metrics."""
    samples: str = ""
    """Where the samples came from (recorded only)."""
    samples_sha256: str = ""
    """Hash of the samples, or of the model and what drew them (recorded only)."""
    seed: int | None = None
    """Seed of the samples (recorded only)."""
    versions: tuple[str, ...] = field(default_factory=lambda: installed_versions())
    """Packages and their versions (recorded only)."""


def installed_versions() -> tuple[str, ...]:
    """Python and the packages that take part in a score."""
    return tuple(f"{name} {number}" for name, number in versions().items())


def same_protocol(a: Protocol, b: Protocol) -> None:
    """UsageError that names the first field in which two scores' protocols differ."""
    for part in fields(Protocol):
        if part.name in RECORDED_ONLY or part.name == "reference":  # its hash counts, not its name
            continue
        one, other = getattr(a, part.name), getattr(b, part.name)
        if one != other:
            raise UsageError(
                f"these scores cannot be compared: their protocols differ in {part.name!r} ({_short(one)} "
                f"and {_short(other)}); evaluate both the same way."
            )


@dataclass(frozen=True, kw_only=True)
class ClassScore:
    """One class's score."""

    name: str
    """The class."""
    count: int
    """Its samples."""
    kid: float
    """KID of its samples against its reference images."""
    kid_error: float
    """Standard error."""
    accuracy: float | None
    """Share of its samples that the probe takes for it."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """All numbers of one evaluation, under their protocol; None: this network or reference cannot give it."""

    protocol: Protocol
    """How the numbers were made."""
    distance_name: str
    """What `distance` is: FID, FD (Lite0), FD (your network)."""
    distance: float
    """Fréchet distance of the pool features; lower is better."""
    floor: float | None
    """The same distance between two disjoint sets of real images."""
    floor_note: str
    """How the floor was made, with its number of images."""
    spatial_distance: float | None = None
    """sFID: Fréchet distance of the spatial features."""
    spatial_floor: float | None = None
    """Its real/real floor."""
    inception_score: float | None = None
    """Inception score; higher is better."""
    inception_score_error: float | None = None
    """Standard error over its splits."""
    precision: float | None = None
    """Improved precision, k = 3."""
    recall: float | None = None
    """Improved recall, k = 3."""
    kid: float | None = None
    """KID, unbiased; not multiplied by anything."""
    kid_error: float | None = None
    """Its standard error."""
    accuracy: float | None = None
    """Share of samples that a linear probe trained on the reference takes for their class."""
    real_accuracy: float | None = None
    """The probe's accuracy on real images that it was not trained on: what a perfect model would get."""
    per_class: tuple[ClassScore, ...] = ()
    """Scores of each class, in the order of the reference's classes."""
    notes: tuple[str, ...] = ()
    """Warnings, such as a bias from too few images."""

    def to_json(self) -> dict[str, Any]:
        """Plain values; `read_score` is its inverse."""
        return asdict(self)


def read_score(path: Path) -> Score:
    """A score that was written as JSON; BadFileError when it is none."""
    if not path.is_file():
        raise FileNotFoundError(f"score {path} does not exist.")
    try:
        return from_dict(Score, read_json(path))
    except UsageError as error:
        raise BadFileError(f"{path} is not a score of kindiff evaluate: {error}") from None


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
