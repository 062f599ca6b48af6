"""The one interface of feature networks, and the two resizes they use.

Shapes: B batch, H/W height and width, C channels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from kindiff.errors import UsageError
from kindiff.runtime import exact_convolutions


class Features(Protocol):
    """A feature network. Its images are uint8 (B, H, W, 3), RGB, its outputs float32 arrays (B, D) by name.

    `pool` is always there (Fréchet distance, KID, precision, recall, probe); `spatial` gives sFID and
    `logits` the inception score.
    """

    @property
    def name(self) -> str:
        """Short name, part of every score's protocol."""

    @property
    def sha256(self) -> str:
        """Hash of the weights, part of every score's protocol."""

    @property
    def resize(self) -> str:
        """How an image becomes the network's input, in words, part of every score's protocol."""

    @property
    def distance_name(self) -> str:
        """What the Fréchet distance of `pool` is called; FID only for the published Inception weights."""

    def __call__(self, images_BHWC: np.ndarray) -> Mapping[str, np.ndarray]:
        """Features of a batch."""


@dataclass(frozen=True, kw_only=True)
class CallableFeatures:
    """A user's own function as a feature network; its distance is called `FD (<name>)`."""

    name: str
    """Short name of the network."""
    function: Callable[[np.ndarray], Mapping[str, np.ndarray]]
    """uint8 (B, H, W, 3) to float arrays (B, D) by name, `pool` among them; each image on its own."""
    version: str
    """Whatever tells two versions of the function apart (the hash of its weights, say)."""
    resize: str = "the function's own"
    """How it makes its input, in words."""

    @property
    def sha256(self) -> str:
        return hashlib.sha256(f"{self.name}\0{self.version}".encode()).hexdigest()

    @property
    def distance_name(self) -> str:
        return f"FD ({self.name})"

    def __call__(self, images_BHWC: np.ndarray) -> Mapping[str, np.ndarray]:
        return self.function(images_BHWC)


def extract(features: Features, images_BHWC: np.ndarray, *, first: int = 0) -> dict[str, np.ndarray]:
    """Features of a batch, checked: every output is float32 (B, D) and finite.

    first: number of the batch's first image, for the message. Raises UsageError for images that are not
    uint8 (B, H, W, 3), a network without `pool`, wrong shapes, NaN or infinity.
    """
    if images_BHWC.dtype != np.uint8 or images_BHWC.ndim != 4 or images_BHWC.shape[-1] != 3:
        raise UsageError(
            f"images are {images_BHWC.dtype} of shape {images_BHWC.shape}; expected: uint8 (B, H, W, 3), RGB."
        )
    with exact_convolutions():
        outputs = features(images_BHWC)
    found = {
        name: np.asarray(value, dtype=np.float32).reshape(len(images_BHWC), -1)
        for name, value in outputs.items()
    }
    if "pool" not in found:
        raise UsageError(f"features {features.name!r} give {sorted(found)}; an output 'pool' is needed.")
    for name, value in found.items():
        bad = np.flatnonzero(~np.isfinite(value).all(axis=1))
        if len(bad):
            raise UsageError(
                f"features {features.name!r} are NaN or infinite for image {first + bad[0]} (output "
                f"{name!r}); the weights or the image are broken."
            )
    return found


PIECE = 4
"""On a CPU so many images go through a network at a time: more would leave the cache between two layers."""


def make_ready_(net: nn.Module, device: str) -> None:
    """Make a network one for evaluation on a device: frozen, channels last (1.5 times faster on a CPU), every batch
    norm taken into the convolution that was defined before it."""
    net.eval().requires_grad_(False)
    for module in net.modules():
        conv = ""
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Conv2d):
                conv = name
            elif isinstance(child, nn.BatchNorm2d):
                setattr(module, conv, fuse_conv_bn_eval(getattr(module, conv), child))
                setattr(module, name, nn.Identity())
    net.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def pieces(images_BHWC: np.ndarray, device: str) -> tuple[torch.Tensor, ...]:
    """uint8 (B, H, W, C) as float32 (b, C, H, W), channels last, values 0 .. 255, b as its device does it fastest:
    all at once, on a CPU PIECE at a time, from the resize on."""
    whole = to_tensor(images_BHWC).to(device)
    return whole.split(PIECE) if whole.device.type == "cpu" else (whole,)


def to_tensor(images_BHWC: np.ndarray) -> torch.Tensor:
    """uint8 (B, H, W, C) as float32 (B, C, H, W), values 0 .. 255."""
    return torch.from_numpy(images_BHWC.astype(np.float32)).permute(0, 3, 1, 2)


def resize_tf1(x_BCHW: torch.Tensor, size: int) -> torch.Tensor:
    """TensorFlow 1's ResizeBilinear (align_corners=False, no half-pixel centres, no antialiasing) to size².

    Output pixel i looks at source position i * in / out, so the picture sits up to half a pixel to the top
    left of what other libraries make; the published FID figures contain this shift. float32, as in the graph.
    """
    y_low, y_high, y_weight = _tf1_taps(x_BCHW.shape[2], size)
    x_low, x_high, x_weight = _tf1_taps(x_BCHW.shape[3], size)
    y_weight = y_weight[:, None]
    left, right = x_BCHW[..., x_low], x_BCHW[..., x_high]
    rows_BCHX = left + (right - left) * x_weight.to(x_BCHW)
    top, bottom = rows_BCHX[:, :, y_low], rows_BCHX[:, :, y_high]
    return top + (bottom - top) * y_weight.to(x_BCHW)


def _tf1_taps(source: int, target: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    scale = torch.tensor(source, dtype=torch.float32) / target
    position = torch.arange(target, dtype=torch.float32) * scale
    low = position.floor().long()
    return low, (low + 1).clamp(max=source - 1), position - low


def resize_half_pixel(x_BCHW: torch.Tensor, size: int) -> torch.Tensor:
    """Bilinear with half-pixel centres, antialiased when it shrinks (Pillow's bilinear), to size²."""
    if x_BCHW.shape[2:] == (size, size):
        return x_BCHW
    return F.interpolate(x_BCHW, size=(size, size), mode="bilinear", align_corners=False, antialias=True)
