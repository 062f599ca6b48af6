"""Training the small autoencoder.

B batch, C latent channels, h/w latent side.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from kindiff.config import EncodeConfig
from kindiff.data.sets import SampleSet
from kindiff.errors import UsageError
from kindiff.models.autoencoder import FACTOR, Autoencoder
from kindiff.progress import Track
from kindiff.randomness import Purpose, stream
from kindiff.runtime import autocast, device_of
from kindiff.train.rollback import NotFinite


def train_autoencoder(samples: SampleSet, config: EncodeConfig) -> Autoencoder:
    """An autoencoder of these images, its latents normalised to unit variance a channel. UsageError when the
    images do not fit it."""
    if samples.channels != 3 or samples.size % FACTOR:
        raise UsageError(
            f"images of side {samples.size} cannot be encoded; the side must be a multiple of {FACTOR}."
        )
    device = device_of(config.device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = Autoencoder(config.model)
    model.to(device).train()
    adam = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=0.0, fused=True)
    order = np.zeros(0, np.int64)
    with Track("training the autoencoder", config.steps * config.batch, unit="images") as track:
        for step in range(config.steps):
            while len(order) < config.batch:
                epoch = stream(config.seed, Purpose.ORDER, step).permutation(len(samples))
                order = np.concatenate([order, epoch])
            indices, order = order[: config.batch], order[config.batch :]
            draws = stream(config.seed, Purpose.FOLD, step)
            x = torch.from_numpy(samples.fetch(indices, draws.random(len(indices)) < 0.5)).to(device)
            shape = (len(x), config.model.channels, samples.size // FACTOR, samples.size // FACTOR)
            noise = torch.from_numpy(draws.standard_normal(shape, dtype=np.float32)).to(device)
            adam.param_groups[0]["lr"] = config.lr * 0.5 * (1 + math.cos(math.pi * step / config.steps))
            with autocast(device, config.precision):
                loss = model.loss(x, noise)
            adam.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            if not norm.isfinite():
                raise NotFinite(
                    f"step {step} of the autoencoder: the gradient's norm is {float(norm)}; nothing was written. Lower "
                    f"the learning rate ({config.lr:g}), or use fp32."
                )
            adam.step()
            if step % 20 == 0:
                track.note = f"loss {float(loss.detach()):.4f}"
            track.advance(config.batch)
    return _normalised(model.cpu().requires_grad_(False).eval(), samples, config)


def _normalised(model: Autoencoder, samples: SampleSet, config: EncodeConfig) -> Autoencoder:
    """Set shift and scale from the latents of up to 2,000 images; in place, at the end of training."""
    some = np.linspace(0, len(samples) - 1, min(len(samples), 2000)).astype(np.int64)
    with torch.inference_mode():
        chunks = np.array_split(some, -(-len(some) // config.batch))
        means = torch.cat([model.encode(_images(samples, chunk, flip=False))[0] for chunk in chunks])
    model.shift_C = means.mean(dim=(0, 2, 3)).clone()
    model.scale_C = 1 / means.std(dim=(0, 2, 3)).clone()
    return model


def _images(samples: SampleSet, indices: np.ndarray, *, flip: bool) -> Tensor:
    return torch.from_numpy(samples.fetch(indices, np.full(len(indices), flip)))
