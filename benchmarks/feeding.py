"""How many latents of 4 x 32 x 32 a loader process makes ready, in images a second of processor time.

    python benchmarks/feeding.py

Processor time, so that other work on the machine does not count; reading from a disk that has to seek is not in it
(the file is in memory after the first pass).
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from kindiff.config import AutoencoderConfig, DataConfig, EncodeConfig, ObjectiveConfig
from kindiff.data.batches import make_batch
from kindiff.data.prepared import write_prepared
from kindiff.models.autoencoder import Autoencoder
from kindiff.train.encoding import encode

IMAGES, BATCH, ROUNDS = 1024, 256, 8


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        pixels = np.random.default_rng(0).integers(0, 256, (64, 128, 128, 3), np.uint8)
        chunks = (("noise", pixels) for _ in range(IMAGES // len(pixels)))
        write_prepared(folder / "images", chunks, size=128, source="noise")
        Autoencoder(AutoencoderConfig(width=8)).save_pretrained(folder / "codec")
        data = DataConfig(source=str(folder / "images"), size=128)
        latents = encode(EncodeConfig(data=data, autoencoder=str(folder / "codec")), folder / "latents")
        seconds = []
        for number in range(ROUNDS):
            started = time.process_time()
            make_batch(
                latents, ObjectiveConfig(), seed=0, first_position=number * BATCH, batch=BATCH, flip=True
            )
            seconds.append(time.process_time() - started)
    print(f"{BATCH / np.median(seconds[1:]):,.0f} images a second of processor time, one process")


if __name__ == "__main__":
    main()
