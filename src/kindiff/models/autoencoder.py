"""A small convolutional autoencoder: four-times smaller latents that are trained in minutes on two cores.

B batch, C latent channels, H/W image side, h/w = H/4, W/4.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kindiff import checkpoint
from kindiff.config import AutoencoderConfig, from_dict, to_dict
from kindiff.errors import BadFileError, UsageError
from kindiff.models.codec import Codec

FACTOR = 4


class Residual(nn.Module):
    """Two normalised 3 x 3 convolutions beside the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1),
            nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class Autoencoder(Codec):
    """The small autoencoder. Latents are normalised to zero mean and unit variance a channel by `shift_C` and
    `scale_C`, measured on the training images."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(2), nn.Conv2d(12, width, 3, padding=1), Residual(width),
            nn.PixelUnshuffle(2), nn.Conv2d(4 * width, 2 * width, 1), Residual(2 * width),
            nn.GroupNorm(8, 2 * width), nn.SiLU(), nn.Conv2d(2 * width, 2 * config.channels, 1),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            nn.Conv2d(config.channels, 2 * width, 3, padding=1), Residual(2 * width), Residual(2 * width),
            nn.Conv2d(2 * width, 4 * width, 1), nn.PixelShuffle(2), Residual(width),
            nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, 12, 3, padding=1), nn.PixelShuffle(2),
        )  # fmt: skip
        self.register_buffer("shift_C", torch.zeros(config.channels))
        self.register_buffer("scale_C", torch.ones(config.channels))

    @property
    def factor(self) -> int:
        return FACTOR

    def encode(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = self.encoder(x_BCHW).chunk(2, dim=1)
        return self.normalise(mean, log_variance.clamp(-20, 10))

    def decode(self, z_BChw: Tensor) -> Tensor:
        return self.decoder(self.denormalise(z_BChw))

    def loss(self, x_BCHW: Tensor, noise_BChw: Tensor, *, kl_weight: float = 1e-4) -> Tensor:
        """Absolute error, that of the horizontal and vertical differences (edges), and a little KL."""
        mean, log_variance = self.encode(x_BCHW)
        y_BCHW = self.decode(mean + (0.5 * log_variance).exp() * noise_BChw).float()
        error = F.l1_loss(y_BCHW, x_BCHW)
        edges = F.l1_loss(y_BCHW.diff(dim=2), x_BCHW.diff(dim=2)) + F.l1_loss(
            y_BCHW.diff(dim=3), x_BCHW.diff(dim=3)
        )
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        return error + 0.5 * edges + kl_weight * kl

    def fingerprint(self) -> str:
        return checkpoint.hash_tensors(self.state_dict())

    def write_files(self, folder: Path) -> None:
        """config.json and model.safetensors."""
        description = {"format": checkpoint.FORMAT, "kind": "autoencoder", "model": to_dict(self.config)}
        checkpoint.write_json(folder / "config.json", description)
        checkpoint.write_tensors(folder / "model.safetensors", self.state_dict())

    @staticmethod
    def from_pretrained(directory: str | Path) -> Autoencoder:
        """Read what save_pretrained wrote. FileNotFoundError or BadFileError names the file."""
        folder = Path(directory)
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"{folder} is no autoencoder directory: it has no config.json.")
        description = checkpoint.read_json(folder / "config.json")
        if description.get("kind") != "autoencoder" or description.get("format") != checkpoint.FORMAT:
            raise BadFileError(f"{folder / 'config.json'} does not describe an autoencoder of ours.")
        try:
            model = Autoencoder(from_dict(AutoencoderConfig, description.get("model")))
        except UsageError as error:
            raise BadFileError(f"{folder / 'config.json'} is damaged: {error}") from None
        tensors = checkpoint.read_tensors(folder / "model.safetensors")
        checkpoint.check_tensors(folder / "model.safetensors", tensors, model.state_dict())
        model.load_state_dict(tensors)
        return model.requires_grad_(False).eval()
