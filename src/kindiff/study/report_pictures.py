"""Pictures for a report: samples of several models on the same noise and classes, real images, nearest neighbours.

N samples, M training images, F pixels of an image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.spatial.distance import cdist

from kindiff.components.views import exchange_tailors, tailor_cosines
from kindiff.config import DataConfig, SampleConfig
from kindiff.data import ImageSet, open_samples
from kindiff.pipeline import DiTPipeline
from kindiff.report.page import heading, paragraph, sheet

CLASSES = 12
"""A sheet shows at most so many classes, the first ones; none are picked."""
DRAWN = 8
"""Samples of each class that are compared with the training images."""
SHOWN = 2
"""Samples of each class in a sheet of many methods."""


@dataclass(frozen=True)
class Neighbours:
    """The training image nearest to each query of the same class, by the root mean square over pixels in [0, 1]."""

    index: np.ndarray
    """(N,) number of the training image among those of the class."""
    mirrored: np.ndarray
    """(N,) whether its mirror image is the nearer one (training mirrors images)."""
    distance: np.ndarray
    """(N,) how far it is; 0 for a copy."""


def nearest(queries_NHWC: np.ndarray, training_MHWC: np.ndarray) -> Neighbours:
    """For each image the nearest training image or its mirror image."""
    keys = np.concatenate([training_MHWC, training_MHWC[:, :, ::-1]])
    flat_NF, flat_MF = (x.reshape(len(x), -1).astype(np.float64) / 255 for x in (queries_NHWC, keys))
    distances = cdist(flat_NF, flat_MF) / np.sqrt(flat_NF.shape[1])
    best = distances.argmin(axis=1)
    return Neighbours(best % len(training_MHWC), best >= len(training_MHWC), distances.min(axis=1))


def images_of(config: DataConfig) -> ImageSet | str:
    """A data set's images; or in a sentence why there are none to show."""
    try:
        samples = open_samples(config)
    except (OSError, ValueError, ImportError) as error:
        return f"The real images are not here ({error})"
    if isinstance(samples, ImageSet):
        return samples
    return "The data are latents, so no real images stand beside the samples."


def draw(pipeline: DiTPipeline, names: Sequence[str], count: int, config: SampleConfig) -> np.ndarray:
    """`count` samples of each class, (classes, count, H, W, 3). Sample k of a class has the same noise whatever the
    model and the count."""
    images = pipeline.sample(pipeline.model.classes.ids(names) * count, config)
    return images.reshape(count, len(names), *images.shape[1:]).swapaxes(0, 1)


def zoom_of(size: int) -> int:
    """How often a picture of this side is enlarged."""
    return max(1, round(48 / size))


def closeness(
    drawn: Mapping[str, np.ndarray], training: ImageSet, held_out: ImageSet
) -> dict[str, Neighbours]:
    """For every class the nearest training images of its samples, and under the name `real` those of held-out real
    images of all these classes, for comparison."""
    found = {name: nearest(images, training.select([name]).images) for name, images in drawn.items()}
    real = [
        nearest(held_out.select([name], per_class=50).images, training.select([name]).images).distance
        for name in drawn
    ]
    distances = np.concatenate(real)
    return found | {"real": Neighbours(np.zeros(0, int), np.zeros(0, bool), distances)}


def neighbours_sheet(
    drawn: Mapping[str, np.ndarray], training: ImageSet, held_out: ImageSet, label: str
) -> list[str]:
    """The memorisation check: for each class the sample that is closest to a training image, beside that image."""
    found = closeness(drawn, training, held_out)
    real = float(np.median(found.pop("real").distance))
    own = np.concatenate([n.distance for n in found.values()])
    names = list(found)
    samples, images = [], []
    for name in names:
        n = found[name]
        i = int(n.distance.argmin())
        picture = training.select([name]).images[n.index[i]]
        samples.append(drawn[name][i : i + 1])
        images.append((picture[:, ::-1] if n.mirrored[i] else picture)[None])
    copies = int((own < 0.25 * real).sum())
    said = (
        f"the median of {len(own)} samples is {float(np.median(own)) / real:.2f} times as far from its nearest "
        f"training image as real images that were not trained on are (below 1: closer); {copies} samples are within "
        "a quarter of that distance."
        if real > 0
        else "most real images that were not trained on equal a training image, so nearness tells nothing here."
    )
    shown = "Shown is the closest pair of every class; mirror images count, distances are over pixels."
    return [
        heading("Are samples copies of training images?", 3),
        paragraph(f"{label}: {said} {shown}"),
        sheet(
            names,
            [("sample", samples), ("nearest training image", images)],
            zoom=zoom_of(training.size),
            wide=True,
        ),
    ]


def exchange_sheet(pipeline: DiTPipeline, config: SampleConfig, real: ImageSet | str) -> list[str]:
    """What one tailor changes: learngenes alone, the class's own tailor, the most and the least alike other tailor."""
    model = pipeline.model
    names = model.classes.names[:CLASSES]
    cosines = tailor_cosines(model)
    every = range(len(model.classes))
    alike = [max((j for j in every if j != i), key=lambda j: float(cosines[i, j])) for i in every]
    unlike = [min((j for j in every if j != i), key=lambda j: float(cosines[i, j])) for i in every]
    ids = [i for i in range(len(names)) for _ in range(SHOWN)]

    def strips(pipe: DiTPipeline, *, tailors: bool = True) -> list[np.ndarray]:
        return np.split(pipe.sample(ids, config, tailors=tailors), len(names))

    def with_others(partners: list[int]) -> list[np.ndarray]:
        return strips(DiTPipeline(exchange_tailors(model, partners), pipeline.autoencoder))

    bare, own, near, far = (
        strips(pipeline, tailors=False),
        strips(pipeline),
        with_others(alike),
        with_others(unlike),
    )
    lines = [
        ("learngenes alone", bare),
        ("its own tailor", own),
        ("most alike tailor", near),
        ("least alike tailor", far),
    ]
    if isinstance(real, ImageSet):
        lines.insert(0, ("real", [real.select([name], per_class=SHOWN).images for name in names]))
    heads = [
        f"{name} / {model.classes.names[a]} / {model.classes.names[u]}"
        for name, a, u in zip(names, alike, unlike, strict=False)
    ]
    return [
        heading("What one tailor changes", 3),
        paragraph(
            "Down a column the noise and the class embedding are the same; only the tailor differs: none, the class's "
            "own, that of the class whose tailor is most alike, and of the one least alike (by cosine). Heads: class / "
            "most alike / least alike."
        ),
        sheet(heads, lines, zoom=zoom_of(own[0].shape[1]), wide=True),
    ]


def pipeline_at(folder: Path) -> DiTPipeline | None:
    """The model of a folder; None where there is none."""
    return DiTPipeline.from_pretrained(folder) if (folder / "config.json").is_file() else None
