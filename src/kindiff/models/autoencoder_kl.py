"""diffusers' AutoencoderKL (Stable Diffusion's autoencoder and its kin) behind our interface.

B batch, C latent channels, H/W image side, h/w latent side.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kindiff import checkpoint
from kindiff.errors import BadFileError, UsageError
from kindiff.models.codec import Codec

CLASS = "AutoencoderKL"
WEIGHTS = "diffusion_pytorch_model.safetensors"
_HASHED = ("act_fn", "norm_num_groups", "scaling_factor", "shift_factor", "latents_mean", "latents_std")
"""Settings that change what the weights compute and cannot be seen in their shapes."""


class AutoencoderKL(Codec):
    """A diffusers AutoencoderKL; latents are normalised as diffusers' own pipelines do: (z - shift) * scaling_factor,
    with shift_factor, or the channels' latents_mean and latents_std where its configuration has them."""

    def __init__(self, vae: Any) -> None:
        """vae: a diffusers.AutoencoderKL; UsageError for one that does not take and give RGB images."""
        super().__init__()
        config = vae.config
        if (config.in_channels, config.out_channels) != (3, 3):
            raise UsageError(
                f"the autoencoder has {config.in_channels} channels in and {config.out_channels} out; images have 3."
            )
        self.vae = vae
        channels = config.latent_channels
        shift = config.latents_mean or config.shift_factor or 0.0
        scale = torch.full((channels,), float(config.scaling_factor))
        if config.latents_std:
            scale = scale / torch.tensor(config.latents_std)
        shift_C = torch.full((channels,), shift) if isinstance(shift, float | int) else torch.tensor(shift)
        self.register_buffer("shift_C", shift_C.float())
        self.register_buffer("scale_C", scale.float())
        self.float().requires_grad_(False).eval()

    @property
    def factor(self) -> int:
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    def encode(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        posterior = self.vae.encode(x_BCHW).latent_dist
        return self.normalise(posterior.mean, posterior.logvar)

    def decode(self, z_BChw: Tensor) -> Tensor:
        return self.vae.decode(self.denormalise(z_BChw)).sample

    def fingerprint(self) -> str:
        settings = {name: self.vae.config.get(name) for name in _HASHED}
        weights = checkpoint.hash_tensors(self.vae.state_dict())
        return hashlib.sha256(json.dumps([settings, weights]).encode()).hexdigest()

    def write_files(self, folder: Path) -> None:
        """config.json and the weights, as diffusers reads them; equal autoencoders give equal bytes."""
        settings = {key: value for key, value in self.vae.config.items() if not key.startswith("_")}
        checkpoint.write_json(folder / "config.json", {"_class_name": CLASS, **settings})
        checkpoint.write_tensors(folder / WEIGHTS, self.vae.state_dict(), {"format": "pt"})

    @staticmethod
    def from_pretrained(source: str | Path) -> AutoencoderKL:
        """A folder of diffusers' (an AutoencoderKL's, or a pipeline's with `vae` in it), or a name on the hub:
        `owner/name`, or `owner/name/vae` for a folder in it.

        The weights are read from safetensors only. FileNotFoundError, or BadFileError for weights that are damaged
        or do not fit; ImportError says what to install.
        """
        place, folder = str(source), Path(source).expanduser()
        options: dict[str, Any] = {}
        if folder.exists():
            if (folder / "model_index.json").is_file():
                folder = folder / "vae"
            place = str(folder)
            _check_folder(folder)
        else:
            parts = place.split("/")
            if len(parts) < 2 or place.startswith(("/", ".", "~")):
                raise FileNotFoundError(f"autoencoder {place} does not exist; give a folder or owner/name.")
            place, options = "/".join(parts[:2]), {"subfolder": "/".join(parts[2:])}
        return AutoencoderKL(_load(place, options))


def _load(place: str, options: dict[str, Any]) -> Any:
    from safetensors import SafetensorError

    try:
        from diffusers import AutoencoderKL as Theirs
    except ImportError:
        raise ImportError("diffusers is not installed; pip install 'kindiff[diffusers]'.") from None
    try:
        vae, info = Theirs.from_pretrained(
            place, use_safetensors=True, low_cpu_mem_usage=False, output_loading_info=True, **options
        )
    except (SafetensorError, RuntimeError, ValueError, TypeError, KeyError) as error:
        raise BadFileError(f"the weights of {place} are damaged or do not fit: {_first(error)}") from None
    except OSError as error:
        raise FileNotFoundError(
            f"autoencoder {place} cannot be had, neither as a folder nor from the hub: {_first(error)}"
        ) from None
    for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[fault]:
            names = sorted(map(str, info[fault]))
            raise BadFileError(f"the weights of {place} do not fit its config.json: {fault} {names[:3]}.")
    return vae


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} is no folder of a diffusers {CLASS}: it has no config.json.")
    found = checkpoint.read_json(folder / "config.json").get("_class_name")
    if found != CLASS:
        raise BadFileError(f"{folder / 'config.json'} describes {found!r}, not diffusers' {CLASS}.")
    if (folder / WEIGHTS).is_file():
        checkpoint.read_header(folder / WEIGHTS)


def _first(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__
