"""Reference files of guided-diffusion (.npz): read and written.

Layout: `mu`, `sigma` of Inception's pool features (2048), `mu_s`, `sigma_s` of its spatial features (2023),
and `arr_0`, uint8 images (10,000 of them in the published files) for precision and recall.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from kindiff.errors import BadFileError, UsageError
from kindiff.evaluate import reference as reference_module
from kindiff.evaluate.features import Features
from kindiff.evaluate.images import Images, NpzImages, open_npz, read_array
from kindiff.evaluate.moments import Moments
from kindiff.evaluate.reference import KEPT, Reference, evenly
from kindiff.evaluate.store import Progress, no_progress

NAMES = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}


def read_moments(path: Path) -> dict[str, Moments]:
    """The statistics of a file, empty when it has none; count is 0: the file does not say of how many images.

    Raises BadFileError for shapes that do not fit each other, NaN or damaged contents.
    """
    found = {}
    with open_npz(path) as archive:
        present = {name.removesuffix(".npy") for name in archive.namelist()}
        for output, (mean_name, cov_name) in NAMES.items():
            if not {mean_name, cov_name} <= present:
                continue
            mean = read_array(archive, path, mean_name).astype(np.float64)
            cov = read_array(archive, path, cov_name).astype(np.float64)
            if mean.ndim != 1 or cov.shape != (len(mean), len(mean)):
                raise BadFileError(
                    f"{path}: {mean_name} {mean.shape} and {cov_name} {cov.shape} are no mean and covariance."
                )
            if not (np.isfinite(mean).all() and np.isfinite(cov).all()):
                raise BadFileError(f"{path}: {mean_name} or {cov_name} has NaN or infinite values.")
            found[output] = Moments(0, mean, cov)
    return found


def read_reference(
    path: Path,
    features: Features,
    folder: Path,
    *,
    batch: int = 64,
    progress: Progress = no_progress,
) -> Reference:
    """A reference of an .npz file: its own statistics where it has them, its images for the rest.

    features: must be Inception when the file brings statistics, since they are of Inception's features.
    """
    images = NpzImages(path)
    statistics = read_moments(path)
    built = reference_module.build(images, features, folder, keep=KEPT, batch=batch, progress=progress)
    for output, value in statistics.items():
        if output not in built.moments:
            raise UsageError(
                f"{path} brings statistics of Inception features ({NAMES[output][0]}); evaluate with the "
                f"inception features, not {features.name!r}."
            )
        if value.dims != built.moments[output].dims:
            raise UsageError(
                f"{path}: {NAMES[output][0]} has {value.dims} dimensions, the features {features.name!r} "
                f"have {built.moments[output].dims}; evaluate with the network that the file was made with."
            )
    if not statistics:
        return built
    return replace(built, info=replace(built.info, count=0), moments={**built.moments, **statistics})


def write_reference(path: Path, reference: Reference, images: Images) -> None:
    """A reference and its kept images as a guided-diffusion .npz (also readable by its own evaluator)."""
    arrays: dict[str, np.ndarray] = {}
    for output, value in reference.moments.items():
        mean_name, cov_name = NAMES[output]
        arrays |= {mean_name: value.mean, cov_name: value.cov}
    index = evenly(len(images), reference.info.kept)
    arrays["arr_0"] = np.stack([images.read(int(i), int(i) + 1)[0] for i in index])
    np.savez(path, allow_pickle=False, **arrays)
