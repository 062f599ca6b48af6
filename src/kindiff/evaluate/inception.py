"""InceptionV3 as FID means it: the 2015 TensorFlow graph, with the names of its published PyTorch port.

Written from the paper (Szegedy et al. 2015, "Rethinking the Inception Architecture") and from the three
points in which the 2015 graph differs from other InceptionV3s: average pooling does not count the padding,
the last block pools by the maximum, and the classifier has 1008 rows.

Shapes: B batch, C channels; 299 x 299 in, 35, 17 and 8 cells a side in the blocks 5, 6 and 7.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from kindiff.checkpoint import sha256 as file_sha256
from kindiff.evaluate.features import make_ready_, pieces, resize_tf1
from kindiff.evaluate.weights import checked, download, load_into, load_state

WEIGHTS_NAME = "pt_inception-2015-12-05-6726825d.pth"
WEIGHTS_URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{WEIGHTS_NAME}"
WEIGHTS_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
SIDE = 299
SPATIAL_CHANNELS = 7


class Conv(NamedTuple):
    """One convolution with batch norm and ReLU; stride 1 keeps the size, stride 2 does not pad."""

    name: str
    out: int
    kernel: tuple[int, int]
    stride: int = 1


class Tower(NamedTuple):
    """A branch: an optional 3 x 3 pooling, convolutions in a row, and at the end perhaps two side by side."""

    convs: tuple[Conv, ...] = ()
    fork: tuple[Conv, ...] = ()
    pool: str = ""


def _row(name: str, *convs: tuple[int, int, int], stride: int = 1) -> tuple[Conv, ...]:
    """Convolutions name_1, name_2, ... of (channels, kernel height, width); the last one has the stride."""
    last = len(convs)
    return tuple(
        Conv(f"{name}_{i}", out, (height, width), stride if i == last else 1)
        for i, (out, height, width) in enumerate(convs, start=1)
    )


def _one(name: str, out: int) -> tuple[Conv, ...]:
    return (Conv(name, out, (1, 1)),)


def _block_5(pooled: int) -> tuple[Tower, ...]:  # 35 x 35
    return (
        Tower(_one("branch1x1", 64)),
        Tower(_row("branch5x5", (48, 1, 1), (64, 5, 5))),
        Tower(_row("branch3x3dbl", (64, 1, 1), (96, 3, 3), (96, 3, 3))),
        Tower(_one("branch_pool", pooled), pool="avg"),
    )


def _block_6a() -> tuple[Tower, ...]:  # 35 x 35 to 17 x 17
    return (
        Tower((Conv("branch3x3", 384, (3, 3), 2),)),
        Tower(_row("branch3x3dbl", (64, 1, 1), (96, 3, 3), (96, 3, 3), stride=2)),
        Tower(pool="max/2"),
    )


def _block_6(width: int) -> tuple[Tower, ...]:  # 17 x 17
    w = width
    return (
        Tower(_one("branch1x1", 192)),
        Tower(_row("branch7x7", (w, 1, 1), (w, 1, 7), (192, 7, 1))),
        Tower(_row("branch7x7dbl", (w, 1, 1), (w, 7, 1), (w, 1, 7), (w, 7, 1), (192, 1, 7))),
        Tower(_one("branch_pool", 192), pool="avg"),
    )


def _block_7a() -> tuple[Tower, ...]:  # 17 x 17 to 8 x 8
    return (
        Tower(_row("branch3x3", (192, 1, 1), (320, 3, 3), stride=2)),
        Tower(_row("branch7x7x3", (192, 1, 1), (192, 1, 7), (192, 7, 1), (192, 3, 3), stride=2)),
        Tower(pool="max/2"),
    )


def _block_7(pool: str) -> tuple[Tower, ...]:  # 8 x 8
    def fork(name: str) -> tuple[Conv, ...]:
        return Conv(f"{name}a", 384, (1, 3)), Conv(f"{name}b", 384, (3, 1))

    return (
        Tower(_one("branch1x1", 320)),
        Tower(_row("branch3x3", (384, 1, 1)), fork("branch3x3_2")),
        Tower(_row("branch3x3dbl", (448, 1, 1), (384, 3, 3)), fork("branch3x3dbl_3")),
        Tower(_one("branch_pool", 192), pool=pool),
    )


class ConvUnit(nn.Module):
    """Convolution without bias, batch norm (epsilon 0.001), ReLU."""

    def __init__(self, channels: int, spec: Conv, *, pad: bool) -> None:
        super().__init__()
        padding = (spec.kernel[0] // 2, spec.kernel[1] // 2) if pad else (0, 0)
        self.conv = nn.Conv2d(channels, spec.out, spec.kernel, spec.stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(spec.out, eps=0.001)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Mixed(nn.Module):
    """Towers side by side, joined along the channels in their order."""

    def __init__(self, channels: int, towers: tuple[Tower, ...]) -> None:
        super().__init__()
        self.towers = towers
        for tower in towers:
            width = channels
            for spec in tower.convs:
                self.add_module(spec.name, ConvUnit(width, spec, pad=spec.stride == 1))
                width = spec.out
            for spec in tower.fork:
                self.add_module(spec.name, ConvUnit(width, spec, pad=True))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([part for tower in self.towers for part in self._run(tower, x)], dim=1)

    def _run(self, tower: Tower, x: torch.Tensor) -> list[torch.Tensor]:
        if tower.pool == "avg":
            x = F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
        elif tower.pool == "max":
            x = F.max_pool2d(x, 3, stride=1, padding=1)
        elif tower.pool == "max/2":
            x = F.max_pool2d(x, 3, stride=2)
        for spec in tower.convs:
            x = self.get_submodule(spec.name)(x)
        return [self.get_submodule(spec.name)(x) for spec in tower.fork] or [x]


class FIDInception(nn.Module):
    """The graph. forward: float32 (B, 3, 299, 299) in [-1, 1) to (pool (B, 2048), spatial (B, 2023))."""

    def __init__(self) -> None:
        super().__init__()

        def stem(channels: int, out: int, kernel: int, stride: int = 1, pad: bool = False) -> ConvUnit:
            return ConvUnit(channels, Conv("", out, (kernel, kernel), stride), pad=pad)

        self.Conv2d_1a_3x3 = stem(3, 32, 3, stride=2)  # 149
        self.Conv2d_2a_3x3 = stem(32, 32, 3)  # 147
        self.Conv2d_2b_3x3 = stem(32, 64, 3, pad=True)  # 147, then pooled to 73
        self.Conv2d_3b_1x1 = stem(64, 80, 1)  # 73
        self.Conv2d_4a_3x3 = stem(80, 192, 3)  # 71, then pooled to 35
        self.Mixed_5b = Mixed(192, _block_5(32))
        self.Mixed_5c = Mixed(256, _block_5(64))
        self.Mixed_5d = Mixed(288, _block_5(64))
        self.Mixed_6a = Mixed(288, _block_6a())
        self.Mixed_6b = Mixed(768, _block_6(128))
        self.Mixed_6c = Mixed(768, _block_6(160))
        self.Mixed_6d = Mixed(768, _block_6(160))
        self.Mixed_6e = Mixed(768, _block_6(192))
        self.Mixed_7a = Mixed(768, _block_7a())
        self.Mixed_7b = Mixed(1280, _block_7("avg"))
        self.Mixed_7c = Mixed(2048, _block_7("max"))
        self.fc = nn.Linear(2048, 1008)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))
        # sFID (Nash et al. 2021) as the guided-diffusion evaluator reads it: tensor mixed_6/conv:0 is the
        # activated 1x1 branch of this block, the first of the joined channels; 17 x 17 x 7, channels last.
        spatial = x[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))
        return x.mean(dim=(2, 3)), spatial


class InceptionFeatures:
    """Features of FID, sFID, the inception score, precision and recall.

    Outputs: pool (B, 2048), spatial (B, 2023), logits (B, 1008) without the bias, as the guided-diffusion
    evaluator computes the score. Source: weights converted from TensorFlow's inception-2015-12-05.
    """

    name = "inception-2015-12-05"
    resize = "TF1 bilinear (no half-pixel centres, no antialiasing) to 299, (x - 128) / 128"

    def __init__(self, net: FIDInception, *, sha256: str, device: str = "cpu") -> None:
        make_ready_(net, device)
        self.net = net
        self.sha256 = sha256
        self.device = device

    @property
    def distance_name(self) -> str:
        return "FID" if self.sha256 == WEIGHTS_SHA256 else "FD (Inception, unpublished weights)"

    @staticmethod
    def load(
        path: Path | None = None, *, sha256: str | None = WEIGHTS_SHA256, device: str = "cpu"
    ) -> InceptionFeatures:
        """The network with the weights of a file, or with the published ones, downloaded once to the cache.

        sha256: what the file must hash to; None for weights of one's own, whose distance is then not called
        FID. Raises BadFileError for a wrong hash or layout and OSError when the download fails.
        """
        if path is None:
            path = download(WEIGHTS_URL, WEIGHTS_SHA256, WEIGHTS_NAME)
        elif sha256 is not None:
            checked(path, sha256)
        net = FIDInception()
        load_into(net, load_state(path), path)
        return InceptionFeatures(net, sha256=file_sha256(path), device=device)

    @torch.inference_mode()
    def __call__(self, images_BHWC: np.ndarray) -> dict[str, np.ndarray]:
        inputs = (resize_tf1(piece, SIDE) for piece in pieces(images_BHWC, self.device))
        outputs = [self.net((x - 128.0) / 128.0) for x in inputs]
        pool, spatial = (torch.cat(parts) for parts in zip(*outputs, strict=True))
        logits = pool @ self.net.fc.weight.T
        return {key: value.cpu().numpy() for key, value in zip(OUTPUTS, (pool, spatial, logits), strict=True)}


OUTPUTS = ("pool", "spatial", "logits")
