"""Small real things for tests: picture sets, configs, and ways to run a command."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from kindiff.config import (
    BackboneConfig,
    DataConfig,
    KindConfig,
    ObjectiveConfig,
    PretrainConfig,
    TrainConfig,
)
from kindiff.data.prepared import write_prepared

SHAPES = ("disc", "bars", "chess", "ramp")
NEW_SHAPES = ("ring", "cross")
SIZE = 16


def picture(shape: str, k: int, size: int = SIZE) -> np.ndarray:
    """Picture k of a shape, (H, W, 3) uint8: places and shades differ, the kind of thing does not."""
    random = np.random.default_rng([sorted((*SHAPES, *NEW_SHAPES)).index(shape), k])
    y, x = np.mgrid[:size, :size] / size - random.uniform(0.35, 0.65, (2, 1, 1))
    radius = np.hypot(y, x)
    mask = {
        "disc": radius < 0.3,
        "bars": (x * 6) % 2 < 1,
        "chess": ((x * 4) % 2 < 1) ^ ((y * 4) % 2 < 1),
        "ramp": x + y > 0,
        "ring": (radius > 0.2) & (radius < 0.35),
        "cross": (abs(x) < 0.1) | (abs(y) < 0.1),
    }[shape]
    light, dark = random.integers(170, 256, 3), random.integers(0, 90, 3)
    return np.where(mask[..., None], dark, light).astype(np.uint8)


def write_shapes(
    target: Path, shapes: tuple[str, ...] = SHAPES, *, per_class: int = 6, size: int = SIZE
) -> Path:
    """A prepared set of pictures; nothing goes through the cache."""
    chunks = ((s, np.stack([picture(s, k, size) for k in range(per_class)])) for s in shapes)
    write_prepared(target, chunks, size=size, source="shapes drawn by a test")
    return target


def write_image_folder(target: Path, shapes: tuple[str, ...] = SHAPES, *, per_class: int = 6) -> Path:
    """The same pictures as an image folder, one sub-folder a class."""
    for shape in shapes:
        (target / shape).mkdir(parents=True)
        for k in range(per_class):
            Image.fromarray(picture(shape, k)).save(target / shape / f"{k}.png")
    return target


def toy(source: Path, *, method: str = "kind", objective: str = "flow", **train: object) -> PretrainConfig:
    """A pre-training run of seconds: 4 classes at 16 px, width 32, two blocks."""
    loop = {"steps": 12, "batch": 8, "lr": 3e-3, "warmup": 3, "save_every": 4, "log_every": 3}
    return PretrainConfig(
        data=DataConfig(source=str(source), size=SIZE),
        model=BackboneConfig(width=32, depth=2, heads=2, patch=4),
        method=method,
        kind=KindConfig(learngene_rank=8, tailor_rank=2),
        objective=ObjectiveConfig(kind=objective),
        train=TrainConfig(**{**loop, **train}),
    )


def toy_arguments(source: Path, **train: object) -> list[str]:
    """`toy` as options of `kindiff pretrain`."""
    config = toy(source, **train)
    return [
        "--data.source", str(source), "--data.size", str(SIZE),
        "--model.width", "32", "--model.depth", "2", "--model.heads", "2", "--model.patch", "4",
        "--kind.learngene-rank", "8", "--kind.tailor-rank", "2",
        "--train.steps", str(config.train.steps), "--train.batch", str(config.train.batch),
        "--train.lr", str(config.train.lr), "--train.warmup", str(config.train.warmup),
        "--train.save-every", str(config.train.save_every), "--train.log-every", str(config.train.log_every),
    ]  # fmt: skip


def start(*arguments: object, **options: object) -> subprocess.Popen[str]:
    """A `kindiff` process of one thread."""
    return subprocess.Popen(
        [str(kindiff_script()), *map(str, arguments)],
        env=one_thread(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options,
    )  # fmt: skip


def kindiff_script() -> Path:
    """The installed console script."""
    return Path(sys.executable).with_name("kindiff")


def one_thread() -> dict[str, str]:
    """The environment with one thread a process, as the tests' own."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def files_of(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Content and time of change of every file below a folder."""
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def assert_same_tensors(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    """Equal to the bit, name by name."""
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert tensor.dtype == found[name].dtype, name
        assert torch.equal(tensor, found[name]), name


@contextlib.contextmanager
def no_file_longer_than(count: int) -> Iterator[None]:
    """Writes beyond `count` bytes of a file fail in this process, as on a full disk (EFBIG for ENOSPC)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
