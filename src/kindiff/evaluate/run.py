"""One evaluation: samples and a reference in, a score with its protocol out.

Shapes: N samples, K kept reference images, D feature dimensions, C classes.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kindiff.errors import UsageError
from kindiff.evaluate.features import Features
from kindiff.evaluate.images import Images
from kindiff.evaluate.metrics import (
    NEIGHBOURS,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)
from kindiff.evaluate.probe import Probe
from kindiff.evaluate.protocol import ClassScore, Protocol, Score
from kindiff.evaluate.reference import Reference, check_features, real_floor
from kindiff.evaluate.store import FeatureSet, Progress, compute, no_progress
from kindiff.randomness import Purpose, stream

KID_IMAGES = 5000
"""KID uses at most this many images of each set, drawn at random (fixed seed): evenly spaced ones of a set whose
classes take turns would be more of some classes."""
FEW = 3
"""A class with fewer samples has no score of its own."""


@dataclass(frozen=True, kw_only=True)
class SamplerInfo:
    """How samples were drawn, for the protocol; None where it is not known."""

    sampler: str | None = None
    """Sampler."""
    steps: int | None = None
    """Its steps."""
    guidance: float | None = None
    """Its guidance scale."""
    precision: str | None = None
    """Its arithmetic."""
    ema: bool | None = None
    """Whether the weights are the moving average of training."""
    seed: int | None = None
    """Its seed."""


UNKNOWN_SAMPLER = SamplerInfo()


def evaluate(
    samples: Images,
    reference: Reference,
    features: Features,
    *,
    work: Path,
    sampler: SamplerInfo = UNKNOWN_SAMPLER,
    batch: int = 64,
    progress: Progress = no_progress,
) -> Score:
    """Scores samples against a reference under one feature network.

    work: folder for the samples' features; run again with the same one, an interrupted evaluation goes on.
    The score does not depend on batch beyond 1e-6. Warns (and notes in the score) when there are fewer images
    than feature dimensions. Raises UsageError when samples and reference do not fit (network, size).
    """
    check_features(reference, features)
    if samples.size != reference.info.size:
        raise UsageError(
            f"samples are {_size(samples.size)} pixels, the reference's images {_size(reference.info.size)}; "
            "build the reference at the samples' size."
        )
    if len(samples) <= NEIGHBOURS:
        raise UsageError(f"{samples.name} has {len(samples)} images; an evaluation needs {NEIGHBOURS + 1}.")
    found = compute(samples, features, work, batch=batch, progress=progress)
    pool_ND, kept_KD = found.rows("pool"), reference.kept["pool"]
    labels_N, unmatched = _labels(samples, reference)
    notes = [*_bias_notes(len(samples), reference, pool_ND.shape[1]), *unmatched]
    floor = real_floor(reference, "pool", len(samples))
    spatial, spatial_floor = _spatial(found, reference)
    score = _inception_score(found, samples)
    precision, recall = _precision_recall(kept_KD, pool_ND)
    kid = None
    if min(len(pool_ND), len(kept_KD)) >= FEW:
        drawn = [
            pool[np.sort(stream(0, Purpose.FOLD, position).permutation(len(pool))[:KID_IMAGES])]
            for position, pool in enumerate((pool_ND, kept_KD), start=2)
        ]
        kid = kernel_distance(*drawn)
    probe, real_accuracy = reference.probe
    return Score(
        protocol=protocol_of(samples, reference, features, sampler),
        distance_name=features.distance_name,
        distance=frechet_distance(found.moments("pool"), reference.moments["pool"]),
        floor=floor.value if floor else None,
        floor_note=floor.note if floor else "the reference keeps too few images for a floor",
        spatial_distance=spatial,
        spatial_floor=spatial_floor,
        inception_score=score[0] if score else None,
        inception_score_error=score[1] if score else None,
        precision=precision,
        recall=recall,
        kid=kid.value if kid else None,
        kid_error=kid.error if kid else None,
        accuracy=probe.accuracy(pool_ND, labels_N) if probe and labels_N is not None else None,
        real_accuracy=real_accuracy,
        per_class=_per_class(pool_ND, labels_N, reference, probe) if labels_N is not None else (),
        notes=tuple(notes),
    )


def protocol_of(samples: Images, reference: Reference, features: Features, sampler: SamplerInfo) -> Protocol:
    """The protocol of an evaluation, before anything is computed."""
    return Protocol(
        features=features.name,
        features_sha256=features.sha256,
        resize=features.resize,
        count=len(samples),
        size=samples.size,
        encoding=samples.encoding,
        classes=samples.classes.names if samples.classes else (),
        reference=reference.info.name,
        reference_sha256=reference.info.sha256,
        sampler=sampler.sampler,
        steps=sampler.steps,
        guidance=sampler.guidance,
        precision=sampler.precision,
        ema=sampler.ema,
        samples=samples.name,
        samples_sha256=samples.sha256,
        seed=sampler.seed,
    )


def _size(size: tuple[int, ...]) -> str:
    return f"{size[1]} x {size[0]}"


def _bias_notes(count: int, reference: Reference, dims: int) -> list[str]:
    notes = []
    for what, number in (("samples", count), ("reference images", reference.info.count or None)):
        if number is not None and number <= dims:
            notes.append(
                f"{number} {what} are not more than the {dims} feature dimensions: their covariance is "
                "singular and the Fréchet distance biased upwards; compare it only at the same N, and "
                "with the floor."
            )
    for note in notes:
        warnings.warn(note, UserWarning, stacklevel=3)
    return notes


def _labels(samples: Images, reference: Reference) -> tuple[np.ndarray | None, list[str]]:
    """(N,) class ids of the samples in the reference's numbering, and what to tell of it."""
    if samples.labels is None or reference.classes is None or reference.labels is None:
        return None, []
    known = reference.classes.names
    if samples.classes is None:  # an .npz file numbers the classes as the reference does
        if samples.labels.min() < 0 or samples.labels.max() >= len(known):
            return None, [
                f"the samples' labels are not the reference's {len(known)} classes: no scores a class."
            ]
        return samples.labels.astype(np.int64), []
    foreign = [name for name in samples.classes.names if name not in known]
    if foreign:
        return None, [f"class {foreign[0]!r} of the samples is not in the reference: no scores a class."]
    notes = []
    if len(samples.classes) < len(known):
        notes.append(
            f"the samples have {len(samples.classes)} of the reference's {len(known)} classes; for these "
            "alone, build the reference of these classes."
        )
    return np.array([reference.classes.id(name) for name in samples.classes.names])[samples.labels], notes


def _spatial(found: FeatureSet, reference: Reference) -> tuple[float | None, float | None]:
    if "spatial" not in found.outputs or "spatial" not in reference.moments:
        return None, None
    floor = real_floor(reference, "spatial", found.count)
    distance = frechet_distance(found.moments("spatial"), reference.moments["spatial"])
    return distance, floor.value if floor else None


def _inception_score(found: FeatureSet, samples: Images) -> tuple[float, float] | None:
    if "logits" not in found.outputs:
        return None
    logits_NC = found.rows("logits")
    if samples.class_order:  # splits of one class each would score low
        logits_NC = logits_NC[stream(0, Purpose.FOLD, 1).permutation(len(logits_NC))]
    return inception_score(logits_NC)


def _precision_recall(kept_KD: np.ndarray, pool_ND: np.ndarray) -> tuple[float | None, float | None]:
    if len(kept_KD) <= NEIGHBOURS:
        return None, None
    return precision_recall(kept_KD, pool_ND)


def _per_class(
    pool_ND: np.ndarray, labels_N: np.ndarray, reference: Reference, probe: Probe | None
) -> tuple[ClassScore, ...]:
    assert reference.classes is not None
    assert reference.labels is not None
    scores = []
    for i, name in enumerate(reference.classes.names):
        own, real = pool_ND[labels_N == i], reference.kept["pool"][reference.labels == i]
        if min(len(own), len(real)) < FEW:
            continue
        kid = kernel_distance(own, real)
        scores.append(
            ClassScore(
                name=name,
                count=len(own),
                kid=kid.value,
                kid_error=kid.error,
                accuracy=probe.accuracy(own, np.full(len(own), i)) if probe else None,
            )
        )
    return tuple(scores)
