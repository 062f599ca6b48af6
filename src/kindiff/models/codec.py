"""What every autoencoder offers, and reading one from a directory.

B batch, C latent channels, H/W image side, h/w latent side.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

from torch import Tensor, nn

from kindiff import checkpoint
from kindiff.errors import BadFileError, UsageError


class Codec(nn.Module, ABC):
    """Images to latents and back; the latents are normalised as diffusion models want them.

    A latent z of the autoencoder itself is (z - shift) * scale of that channel here.
    """

    shift_C: Tensor
    scale_C: Tensor

    @property
    @abstractmethod
    def factor(self) -> int:
        """Image side over latent side."""

    @property
    def channels(self) -> int:
        """Latent channels."""
        return len(self.scale_C)

    @abstractmethod
    def encode(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Images in [-1, 1] to (mean, log-variance) of normalised latents, each (B, C, h, w)."""

    @abstractmethod
    def decode(self, z_BChw: Tensor) -> Tensor:
        """Normalised latents to images (B, 3, H, W)."""

    @abstractmethod
    def fingerprint(self) -> str:
        """SHA-256 of its weights and normalisation: a latent model records it."""

    @abstractmethod
    def write_files(self, folder: Path) -> None:
        """Its files, into a folder that exists."""

    def save_pretrained(self, directory: str | Path) -> None:
        """Write its files; the directory appears whole or not at all."""
        with checkpoint.new_directory(Path(directory)) as folder:
            self.write_files(folder)

    def normalise(self, mean: Tensor, log_variance: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance (B, C, h, w) of the autoencoder itself to those of normalised latents."""
        scale = self.scale_C.view(1, -1, 1, 1)
        return (mean - self.shift_C.view(1, -1, 1, 1)) * scale, log_variance + 2 * scale.log()

    def denormalise(self, z_BChw: Tensor) -> Tensor:
        """Normalised latents to those of the autoencoder itself."""
        return z_BChw / self.scale_C.view(1, -1, 1, 1) + self.shift_C.view(1, -1, 1, 1)

    def latent_side(self, size: int) -> int:
        """Side of the latents of images of this side; UsageError when it is no whole number."""
        if size < self.factor or size % self.factor:
            raise UsageError(
                f"images of side {size} cannot be encoded; the side must be a multiple of {self.factor}."
            )
        return size // self.factor


def open_codec(directory: str | Path) -> Codec:
    """The autoencoder of a directory: ours, or diffusers' AutoencoderKL.

    FileNotFoundError or BadFileError names the file; ImportError says what to install for diffusers' own.
    """
    from kindiff.models.autoencoder import Autoencoder
    from kindiff.models.autoencoder_kl import CLASS, AutoencoderKL

    path = Path(directory) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{directory} is no autoencoder directory: it has no config.json.")
    description = checkpoint.read_json(path)
    if description.get("_class_name") == CLASS:
        return AutoencoderKL.from_pretrained(directory)
    if description.get("kind") == "autoencoder":
        return Autoencoder.from_pretrained(directory)
    what = description.get("_class_name") or description.get("kind")
    raise BadFileError(f"{path} describes {what!r}, neither an autoencoder of ours nor diffusers' {CLASS}.")
