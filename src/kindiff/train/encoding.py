"""Images to latents: shard by shard, in several processes and ranks, going on where it was interrupted.

A shard is a function of its images and the autoencoder alone, so who makes it, and when, changes no bit.

n images of a shard, C latent channels, h w latent side.
"""

from __future__ import annotations

import functools
import hashlib
import io
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kindiff import checkpoint
from kindiff.config import EncodeConfig, to_dict
from kindiff.data import open_images
from kindiff.data.latent_manifest import (
    HALF,
    ClassCount,
    CodecFacts,
    LatentManifest,
    Shard,
    shard_file,
)
from kindiff.data.latents import LatentSet
from kindiff.data.manifest import MANIFEST, Skipped
from kindiff.data.pieces import Source, read_piece
from kindiff.data.prepared import as_input
from kindiff.data.sources import open_source, renamed
from kindiff.data.workers import ordered_map, usable_cores
from kindiff.errors import BadFileError, UsageError
from kindiff.models.autoencoder_kl import AutoencoderKL
from kindiff.models.codec import Codec, open_codec
from kindiff.parallel import place
from kindiff.progress import Track, say
from kindiff.runtime import device_of, exact_convolutions, settled
from kindiff.train.autoencoder import train_autoencoder

FREE = ("workers", "device")
"""Settings that do not change the result."""
GPU_WORKERS = 4


def encode(config: EncodeConfig, out: str | Path) -> LatentSet:
    """Write the latents of a set of images to `out`, a directory that `pretrain` takes as data.source.

    Trains an autoencoder first unless one is given; a copy of it goes along with the latents. Interrupted, the same
    call goes on, and the result is the same to the bit. Under torchrun the shards are dealt out to the ranks.
    UsageError when `out` holds something else or the images do not fit the autoencoder, BadFileError for an unreadable
    image where data.strict is set; unreadable images are skipped and listed in the manifest otherwise.
    """
    out = Path(out).absolute()
    rank, ranks = place()
    if not config.autoencoder:
        config = settled(config)
    settings = {key: value for key, value in to_dict(config).items() if key not in FREE}
    while rank and not any((out / name).is_file() for name in (HALF, MANIFEST)):
        time.sleep(0.2)  # the first rank begins
    if (out / MANIFEST).is_file():
        return _whole(config, out, settings, rank)
    source = renamed(open_source(config.data), config.names)
    plan = settings | {"images": source.identity}
    _check_begun(out, plan)
    codec = _codec(config, out, rank, source.size)
    if not (out / "autoencoder").is_dir():
        out.mkdir(parents=True, exist_ok=True)
        checkpoint.write_json(out / HALF, plan)
        codec.save_pretrained(out / "autoencoder")
    facts = CodecFacts(
        sha256=codec.fingerprint(), scale=tuple(codec.scale_C.tolist()), shift=tuple(codec.shift_C.tolist()),
        factor=codec.factor,
    )  # fmt: skip
    shards = -(-len(source) // config.per_shard)
    _make_shards(config, out, source, facts.sha256, range(rank, shards, ranks))
    if rank == 0:
        manifest = _manifest(source, codec, facts, _all_records(out, shards), settings)
        checkpoint.write_json(out / MANIFEST, manifest.to_json())
        _clean(out)
    while not (out / MANIFEST).is_file():
        time.sleep(0.2)
    return LatentSet.open(out)


def _whole(config: EncodeConfig, out: Path, settings: dict[str, Any], rank: int) -> LatentSet:
    """Latents that are there already; shards that were removed (they were damaged) are made anew."""
    manifest = LatentManifest.read(out)
    _check_same(out, manifest.config, settings)
    numbers = [n for n in range(len(manifest.shards)) if not (out / shard_file(n)).is_file()]
    if rank == 0:
        _clean(out)
        if numbers:
            _make_shards(config, out, open_source(config.data), manifest.autoencoder.sha256, numbers)
            records = {number: checkpoint.read_json(_record(out, number)) for number in numbers}
            others = [n for n, record in records.items() if record["sha256"] != manifest.shards[n].sha256]
            for number in others:  # else the same call would find it there
                (out / shard_file(number)).unlink()
            _clean(out)
            if others:
                raise BadFileError(
                    f"{out / shard_file(others[0])} was made anew and is another one: the images, or the machine's "
                    "arithmetic, are not those of the other shards. Encode everything again."
                )
        else:
            say(f"{out} is there already")
    while not all((out / shard_file(number)).is_file() for number in numbers):
        time.sleep(0.2)
    return LatentSet.open(out)


def encode_shard(task: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
    """Make one shard and its record; the task is plain values, as `_make_shards` puts them together."""
    out, number, size = Path(task["out"]), task["number"], task["size"]
    device = device_of(task["device"])
    codec = _on_device(task["out"], task["autoencoder"], str(device))
    faults, content = read_piece(task["piece"])
    pixels = np.frombuffer(content, np.uint8).reshape(-1, size, size, 3)
    if faults and task["strict"]:
        _, name, reason = faults[0]
        return {"fault": f"{name} is no readable image: {reason}; mend or remove it."}, b""
    unreadable = {place for place, _, _ in faults}
    labels = [label for place, label in enumerate(task["labels"]) if place not in unreadable]
    moments = np.concatenate(
        [_moments(codec, pixels[i : i + task["batch"]], device) for i in range(0, len(pixels), task["batch"])]
        or [np.zeros((0, 2, 2, codec.channels, *[size // codec.factor] * 2), np.float32)]
    ).astype(task["dtype"])
    if not np.isfinite(moments).all():
        fault = f"the autoencoder gives numbers that are not finite for images of {shard_file(number)}"
        return {"fault": f"{fault}; are its weights whole, and is dtype wide enough?"}, b""
    file = io.BytesIO()
    np.save(file, moments, allow_pickle=False)
    stored = file.getvalue()
    record = {
        "rows": len(labels), "bytes": len(stored), "sha256": hashlib.sha256(stored).hexdigest(),
        "labels": [[int(i), int(n)] for i, n in zip(*np.unique(labels, return_counts=True), strict=True)],
        "pixels": hashlib.sha256(content).hexdigest(), "autoencoder": task["autoencoder"],
        "skipped": [[name, reason] for _, name, reason in faults],
    }  # fmt: skip
    checkpoint.write_file(out / shard_file(number), stored)
    checkpoint.write_json(_record(out, number), record)
    return record, b""


@torch.inference_mode()
def _moments(codec: Codec, x_BHWC: np.ndarray, device: torch.device) -> np.ndarray:
    """(B, 2, 2, C, h, w) float32: as it is and mirrored, mean and log-variance."""
    x_BCHW = torch.from_numpy(as_input(x_BHWC)).to(device)
    with exact_convolutions():
        pairs = [torch.stack(codec.encode(x), dim=1) for x in (x_BCHW, x_BCHW.flip(3))]
    return torch.stack(pairs, dim=1).cpu().numpy()


@functools.lru_cache(maxsize=1)
def _on_device(out: str, fingerprint: str, device: str) -> Codec:
    return open_codec(Path(out) / "autoencoder").to(device)


def _make_shards(
    config: EncodeConfig, out: Path, source: Source, fingerprint: str, numbers: Sequence[int]
) -> None:
    """The shards of these numbers that are not there yet."""
    device = device_of(config.device)
    lacking = [number for number in numbers if not _is_whole(out, number, fingerprint)]
    spans = [(n * config.per_shard, min((n + 1) * config.per_shard, len(source))) for n in lacking]
    tasks = [
        {
            "out": str(out), "number": number, "size": source.size, "batch": config.batch, "dtype": config.dtype,
            "device": str(device), "autoencoder": fingerprint, "piece": source.piece(start, stop),
            "labels": source.labels[start:stop].tolist(), "strict": config.data.strict,
        }
        for number, (start, stop) in zip(lacking, spans, strict=True)
    ]  # fmt: skip
    workers = config.workers
    if not workers:
        cores = max(1, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        workers = min(GPU_WORKERS, cores) if device.type == "cuda" else cores
    mine = sum(min((n + 1) * config.per_shard, len(source)) - n * config.per_shard for n in numbers)
    done = mine - sum(stop - start for start, stop in spans)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the workers: the number of threads may change the last bits
    try:
        with Track("encoding", mine, unit="images", done=done) as track:
            made = ordered_map("kindiff.train.encoding:encode_shard", tasks, workers=workers)
            for (record, _), (start, stop) in zip(made, spans, strict=True):
                if "fault" in record:
                    raise BadFileError(record["fault"])
                for name, reason in record["skipped"]:
                    say(f"skipped {name}: {reason}")
                track.advance(stop - start)
    finally:
        torch.set_num_threads(threads)
        _on_device.cache_clear()


def _check_begun(out: Path, plan: dict[str, Any]) -> None:
    """UsageError unless the directory is new, or what was begun in it is the same."""
    if (out / HALF).is_file():
        _check_same(out, checkpoint.read_json(out / HALF), plan)
    elif out.exists() and (not out.is_dir() or any(path.name[0] != "." for path in out.iterdir())):
        raise UsageError(f"{out} holds other files; give another path or remove it.")


def _check_same(out: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    old, new = _flat(before), _flat(now)
    for key in sorted({*old, *new}):
        if old.get(key) != new.get(key):
            what = (
                "the images themselves"
                if key == "images"
                else f"{key} was {old.get(key)!r}, now {new.get(key)!r}"
            )
            raise UsageError(
                f"{out} holds latents of other settings ({what}); give another path, or the same settings to go on."
            )


def _flat(values: dict[str, Any], above: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{above}{key}.") if isinstance(value, dict) else {above + key: value}
    return flat


def _codec(config: EncodeConfig, out: Path, rank: int, size: int) -> Codec:
    """The autoencoder: the copy in the directory, or else, by the first rank, the one that is given or trained."""
    folder = out / "autoencoder"
    while rank and not folder.is_dir():
        time.sleep(0.2)
    if folder.is_dir():
        codec = open_codec(folder)
    elif not config.autoencoder:
        codec = train_autoencoder(open_images(config.data), config)
    elif (Path(config.autoencoder).expanduser() / "config.json").is_file():
        codec = open_codec(Path(config.autoencoder).expanduser())
    else:
        codec = AutoencoderKL.from_pretrained(config.autoencoder)
    codec.latent_side(size)
    return codec


def _record(out: Path, number: int) -> Path:
    return out / f"{shard_file(number)}.json"


def _is_whole(out: Path, number: int, fingerprint: str) -> bool:
    """Whether a shard was finished: its record is written after it."""
    if not _record(out, number).is_file():
        return False
    record, file = checkpoint.read_json(_record(out, number)), out / shard_file(number)
    same = record.get("autoencoder") == fingerprint and file.is_file()
    return same and file.stat().st_size == record.get("bytes")


def _all_records(out: Path, shards: int) -> list[dict[str, Any]]:
    """The records of all shards, once every rank has made its own."""
    while not all(_record(out, number).is_file() for number in range(shards)):
        time.sleep(0.2)
    return [checkpoint.read_json(_record(out, number)) for number in range(shards)]


def _manifest(
    source: Source, codec: Codec, facts: CodecFacts, records: list[dict[str, Any]], settings: dict[str, Any]
) -> LatentManifest:
    counts = np.zeros(len(source.classes), np.int64)
    for record in records:
        for label, count in record["labels"]:
            counts[label] += count
    if not counts.all():
        name = source.classes.names[int(np.argmin(counts))]
        raise UsageError(f"class {name!r} has no readable image; mend its files or leave the class out.")
    classes = tuple(
        ClassCount(name=name, count=int(count))
        for name, count in zip(source.classes.names, counts, strict=True)
    )
    shards = tuple(Shard(rows=r["rows"], bytes=r["bytes"], sha256=r["sha256"]) for r in records)
    return LatentManifest(
        classes=classes, shards=shards, channels=codec.channels, side=codec.latent_side(source.size),
        dtype=settings["dtype"], autoencoder=facts,
        images=hashlib.sha256("".join(r["pixels"] for r in records).encode()).hexdigest(),
        skipped=tuple(Skipped(name, reason) for r in records for name, reason in r["skipped"]), config=settings,
    )  # fmt: skip


def _clean(out: Path) -> None:
    """Remove what a whole directory has no need of: records, and what only a killed process leaves."""
    for path in [*out.glob("shard-*.npy.json"), *out.glob(".*.tmp"), out / HALF]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
