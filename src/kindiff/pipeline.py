"""Model + sampler + autoencoder -> images.

B batch, C/H/W of the model's input.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kindiff import checkpoint
from kindiff.config import SampleConfig
from kindiff.diffusion import gaussian, samplers
from kindiff.diffusion.guidance import guided
from kindiff.errors import UsageError
from kindiff.models.codec import Codec, open_codec
from kindiff.models.dit import DiT
from kindiff.models.layers import Gating
from kindiff.parallel import ALONE, Ranks
from kindiff.randomness import Purpose, stream
from kindiff.runtime import autocast, device_of, exact_convolutions


class DiTPipeline:
    """Draws images from a model; a latent model brings its autoencoder."""

    def __init__(self, model: DiT, autoencoder: Codec | None = None) -> None:
        if bool(model.config.autoencoder) != (autoencoder is not None):
            need = "works on latents and needs its autoencoder" if autoencoder is None else "works on pixels"
            raise UsageError(f"the model {need}; give the pipeline what the model was trained with.")
        if autoencoder is not None and autoencoder.fingerprint() != model.config.autoencoder:
            raise UsageError("the autoencoder is not the one whose latents the model was trained on.")
        self.model = model
        self.autoencoder = autoencoder

    @staticmethod
    def from_pretrained(directory: str | Path) -> DiTPipeline:
        """A model directory; the autoencoder is its sub-folder `autoencoder`, where the model is a latent one."""
        model = DiT.from_pretrained(directory)
        folder = Path(directory) / "autoencoder"
        return DiTPipeline(model, open_codec(folder) if model.config.autoencoder else None)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the model and, where there is one, its autoencoder."""
        with checkpoint.new_directory(Path(directory)) as folder:
            self.model.write_files(folder)
            if self.autoencoder is not None:
                (folder / "autoencoder").mkdir()
                self.autoencoder.write_files(folder / "autoencoder")

    def check_draws_pictures(self) -> None:
        """UsageError for a latent model without its autoencoder, as one from a released file is: it draws latents."""
        config = self.model.config
        if self.autoencoder is None and config.on_latents:
            raise UsageError(
                f"the model works on latents of {config.channels} channels and has no autoencoder, so it draws no "
                "pictures; `kindiff convert --to pipeline --vae ...` gives it one in diffusers, "
                "`kindiff pretrain --init` on encoded images here."
            )

    @torch.inference_mode()
    def sample(
        self,
        class_ids: Sequence[int],
        config: SampleConfig,
        *,
        first_index: int = 0,
        tailors: bool = True,
        advance: Callable[[int], None] = lambda count: None,
        ranks: Ranks = ALONE,
    ) -> np.ndarray:
        """Draw one image for each class id (the null id for none): uint8 (B, H, W, C), of pixels C = 3.

        Image i is a function of (config.seed, first_index + i), its class and the model alone. Classes may be
        mixed freely. tailors=False switches every tailor off and keeps the class embeddings: the learngenes
        alone. `advance` is told of finished images. Of several ranks each draws a batch in turn, the batches that
        one would draw alone; the first returns all images, the others none. UsageError for an id that the model
        does not have or a sampler that does not fit its objective.
        """
        rows = self.model.classes.rows
        if bad := [i for i in class_ids if not 0 <= i < rows]:
            raise UsageError(
                f"class id {bad[0]} is not in the model; it has ids 0 to {rows - 1} (the null class)."
            )
        draw = _sampler(self.model, config)
        self.model.to(device_of(config.device))
        if self.autoencoder is not None:
            self.autoencoder.to(device_of(config.device))
        batches = [(i, class_ids[i : i + config.batch]) for i in range(0, len(class_ids), config.batch)]
        images: list[Tensor] = []
        for turn in range(0, len(batches), ranks.count):
            together = batches[turn : turn + ranks.count]
            drawn = None
            if ranks.rank < len(together):
                start, ids = together[ranks.rank]
                drawn = torch.from_numpy(self._batch(ids, first_index + start, config, draw, tailors))
            counts = [len(ids) for _, ids in together]
            images += ranks.to_first(drawn, counts)
            advance(sum(counts))
        return torch.cat(images).numpy() if images else np.zeros((0, 0, 0, 3), np.uint8)

    def _batch(
        self, ids: Sequence[int], first: int, config: SampleConfig, draw: Sampler, tailors: bool
    ) -> np.ndarray:
        device = self.model.positions_TD.device
        shape = (self.model.config.channels, self.model.config.input_size, self.model.config.input_size)
        streams = [stream(config.seed, Purpose.IMAGE, first + i) for i in range(len(ids))]

        def new_noise() -> Tensor:
            noise = np.stack([s.standard_normal(shape, dtype=np.float32) for s in streams])
            return torch.from_numpy(noise).to(device)

        wanted_B = torch.tensor(list(ids), device=device)
        on_B = wanted_B if tailors else torch.full_like(wanted_B, self.model.classes.null_id)

        @functools.cache  # of the steps, which all have the same ids
        def gating(ids_B: Tensor) -> Gating | None:
            usual = tailors and self.model.config.null_gate == "off"
            return self.model.gating(ids_B, None if usual else on_B.repeat(len(ids_B) // len(on_B)))

        def model(x: Tensor, t_B: Tensor, ids_B: Tensor) -> Tensor:
            return self.model(x, t_B, ids_B, gating=gating(ids_B))

        predict = guided(
            model,
            wanted_B,
            null_id=self.model.classes.null_id,
            scale=config.guidance,
            channels=self.model.config.channels,
        )
        with autocast(device, config.precision):
            x = draw(predict, new_noise)
            if self.autoencoder is not None:
                with exact_convolutions():
                    x = self.autoencoder.decode(x)
        return to_uint8(x)


Sampler = Callable[[Callable[[Tensor, Tensor], Tensor], Callable[[], Tensor]], Tensor]


def sampler_of(model: DiT, config: SampleConfig) -> str:
    """The name of the sampler that `auto` or the config means for a model."""
    automatic = "heun" if model.config.objective == "flow" else "ddim"
    return automatic if config.sampler == "auto" else config.sampler


def _sampler(model: DiT, config: SampleConfig) -> Sampler:
    """The sampler as a function of (predict, new_noise)."""
    flow, name = model.config.objective == "flow", sampler_of(model, config)
    if flow != (name in ("euler", "heun")):
        fitting = "euler or heun" if flow else "ddim or ddpm"
        raise UsageError(f"sampler {name!r} does not fit a {model.config.objective} model; use {fitting}.")
    if flow:
        solve = samplers.euler if name == "euler" else samplers.heun
        return lambda predict, new_noise: solve(predict, new_noise(), steps=config.steps)
    few = gaussian.respaced(gaussian.schedule(model.config.schedule), config.steps, spacing=config.spacing)
    if name == "ddim":
        return lambda predict, new_noise: samplers.ddim(predict, new_noise(), schedule=few)
    clip = not model.config.autoencoder
    return lambda predict, new_noise: samplers.ddpm(
        predict, new_noise(), schedule=few, new_noise=new_noise, clip=clip
    )


def to_uint8(x_BCHW: Tensor) -> np.ndarray:
    """Images in [-1, 1] to uint8 (B, H, W, C), rounded to the nearest."""
    scaled = ((x_BCHW.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return scaled.permute(0, 2, 3, 1).cpu().numpy()
