"""Shared small models: real ones, random weights, never an identity start."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kindiff import native
from kindiff.classes import ClassSet
from kindiff.components import factorize
from kindiff.config import DiTConfig, KindConfig
from kindiff.models import DiT

torch.set_num_threads(1)
native.usable()  # made before a test takes the compiler or the cache folder away
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before the kernels are imported: they run without a GPU

NAMES = ("ant", "bee", "cat", "dog", "eel")


def randomised(model: DiT, seed: int = 0) -> DiT:
    """Give every parameter some noise, so that no zero-initialised part hides an error; in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model


@pytest.fixture(params=[True, False], ids=["kernels", "torch"])
def kernels(request, monkeypatch) -> bool:
    """With the CPU's kernels and without them, as on a machine that has no compiler."""
    if not request.param:
        monkeypatch.setattr(native.calls, "kernels", lambda: None)
    elif not native.usable():
        pytest.skip("no kernels here")
    return request.param


@pytest.fixture
def config() -> DiTConfig:
    return DiTConfig(input_size=8, channels=3, num_classes=len(NAMES), width=32, depth=2, heads=2, patch=2)


@pytest.fixture
def dense(config: DiTConfig) -> DiT:
    torch.manual_seed(0)
    return randomised(DiT(config, classes=ClassSet(NAMES)))


@pytest.fixture
def kind_model(dense: DiT) -> DiT:
    return randomised(factorize(dense, KindConfig(learngene_rank=10, tailor_rank=3)), seed=1)


@pytest.fixture
def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Noisy images, timesteps and ids (every class, one twice, the null class)."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.tensor([0, 1, 2, 3, 4, 1, 5])
    return torch.randn(7, 3, 8, 8, generator=generator), torch.rand(7, generator=generator) * 1000, ids


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 512 KiB, where mounting is permitted."""
    place = tmp_path / "disk"
    place.mkdir()
    try:
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", place], capture_output=True, check=False
        )
    except FileNotFoundError:
        pytest.skip("no mount command")
    if mounted.returncode:
        pytest.skip("mounting is not permitted")
    yield place
    subprocess.run(["umount", place], check=True)
