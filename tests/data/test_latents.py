"""Latents: encoded by whoever, whenever, they are the same to the bit; what is damaged or foreign is named."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from kindiff import checkpoint
from kindiff.cli.main import main
from kindiff.config import AutoencoderConfig, DataConfig, EncodeConfig, ObjectiveConfig
from kindiff.data import open_images, open_samples
from kindiff.data.batches import make_batch
from kindiff.data.latent_manifest import HALF, shard_file
from kindiff.data.latents import LatentSet
from kindiff.data.prepared import open_prepared
from kindiff.errors import BadFileError, UsageError
from kindiff.models.autoencoder import Autoencoder
from kindiff.randomness import Purpose, stream
from kindiff.train.encoding import encode
from kindiff.train.rollback import NotFinite
from toys import SHAPES, SIZE, files_of, kindiff_script, one_thread, write_image_folder, write_shapes

OBJECTIVE = ObjectiveConfig(label_dropout=0.0, gate_dropout=0.0)


@pytest.fixture
def codec(tmp_path: Path) -> Path:
    """A small autoencoder of random weights, its latents neither centred nor scaled."""
    torch.manual_seed(0)
    model = Autoencoder(AutoencoderConfig(width=8))
    model.shift_C, model.scale_C = torch.tensor([0.1, -0.2, 0.0, 0.3]), torch.tensor([1.0, 2.0, 0.5, 3.0])
    model.save_pretrained(tmp_path / "codec")
    return tmp_path / "codec"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return write_image_folder(tmp_path / "photos")


def settings(source: Path, codec: Path, **changes: object) -> EncodeConfig:
    """24 images in shards of 5: the last one is smaller, and classes go over the ends."""
    data = DataConfig(source=str(source), size=SIZE)
    return EncodeConfig(
        **{"data": data, "autoencoder": str(codec), "per_shard": 5, "batch": 3, "workers": 1, **changes}
    )


def content_of(folder: Path) -> dict[str, bytes]:
    return {name: content for name, (content, _) in files_of(folder).items()}


def test_moments_of_the_image_and_of_its_mirror_image(tmp_path: Path, codec: Path, photos: Path) -> None:
    latents = encode(settings(photos, codec), tmp_path / "latents")
    images = open_images(DataConfig(source=str(photos), size=SIZE))
    assert latents.classes.names == images.classes.names
    assert np.array_equal(latents.labels, images.labels)
    indices = np.array([0, 23, 11, 4, 5])
    for flipped in (False, True):
        flips = np.full(5, flipped)
        with torch.inference_mode():
            mean, log_variance = Autoencoder.from_pretrained(codec).encode(
                torch.from_numpy(images.fetch(indices, flips))
            )
        np.testing.assert_allclose(latents.fetch(indices, flips), mean, atol=2e-5)
        np.testing.assert_allclose(latents.deviations(indices, flips), (log_variance / 2).exp(), rtol=1e-4)
    as_is, mirrored = (latents.fetch(indices, np.full(5, flip)) for flip in (False, True))
    assert np.abs(mirrored - as_is[..., ::-1]).max() > 0.05, "a mirrored latent is not the mirror image's"
    assert latents.autoencoder().fingerprint() == latents.autoencoder_hash


def test_a_sample_is_drawn_from_its_distribution_by_position(
    tmp_path: Path, codec: Path, photos: Path
) -> None:
    latents = encode(settings(photos, codec), tmp_path / "latents")
    whole = make_batch(latents, OBJECTIVE, seed=3, first_position=20, batch=8, flip=False)
    parts = [make_batch(latents, OBJECTIVE, seed=3, first_position=p, batch=4, flip=False) for p in (20, 24)]
    for name, tensor in whole._asdict().items():
        assert torch.equal(tensor, torch.cat([getattr(part, name) for part in parts])), name
    # what each position adds to the mean is its own deviation times its own noise, and not the diffusion's noise
    drawn = make_batch(latents, OBJECTIVE, seed=3, first_position=0, batch=24, flip=False).x_BCHW.numpy()
    again = make_batch(latents, OBJECTIVE, seed=3, first_position=24, batch=24, flip=False).x_BCHW.numpy()
    noise = np.stack(
        [stream(3, Purpose.LATENT, p).standard_normal((4, 4, 4), dtype=np.float32) for p in range(24)]
    )
    means = latents.fetch(np.arange(24), np.zeros(24, bool))
    deviations = latents.deviations(np.arange(24), np.zeros(24, bool))
    nearest = [int(np.argmin([np.abs(x - m - d * n).max() for m, d in zip(means, deviations, strict=True)]))
               for x, n in zip(drawn, noise, strict=True)]  # fmt: skip
    assert sorted(nearest) == list(range(24)), "each sample once an epoch"
    assert np.array_equal(drawn, means[nearest] + deviations[nearest] * noise)
    assert not any(np.isclose(drawn, x).all() for x in again), "another epoch draws anew"


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_numbers_in_the_files(tmp_path: Path, codec: Path, photos: Path, dtype: str) -> None:
    latents = encode(settings(photos, codec, dtype=dtype), tmp_path / "latents")
    stored = np.load(tmp_path / "latents" / shard_file(4), allow_pickle=False)
    assert stored.shape == (4, 2, 2, 4, 4, 4)
    assert stored.dtype == dtype
    assert latents.fetch(np.arange(3), np.zeros(3, int)).dtype == np.float32
    manifest = json.loads((tmp_path / "latents" / "manifest.json").read_text())
    assert manifest["autoencoder"] == {
        "factor": 4, "scale": [1.0, 2.0, 0.5, 3.0], "sha256": Autoencoder.from_pretrained(codec).fingerprint(),
        "shift": pytest.approx([0.1, -0.2, 0.0, 0.3]),
    }  # fmt: skip


def test_interrupted_it_goes_on_and_is_the_same(
    tmp_path: Path, codec: Path, photos: Path, monkeypatch, capsys
) -> None:
    encode(settings(photos, codec), tmp_path / "whole")
    write, count = checkpoint.write_file, 0

    def full_disk(path: Path, content: bytes) -> None:
        nonlocal count
        count += path.suffix == ".npy"
        if count == 3:
            raise OSError(28, "No space left on device")
        write(path, content)

    monkeypatch.setattr(checkpoint, "write_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        encode(settings(photos, codec), tmp_path / "broken")
    monkeypatch.undo()
    assert (tmp_path / "broken" / HALF).is_file()
    with pytest.raises(
        UsageError, match=r"broken is half encoded; run the same `kindiff encode` command again"
    ):
        open_samples(DataConfig(source=str(tmp_path / "broken")))
    first = (tmp_path / "broken" / shard_file(0)).stat().st_mtime_ns
    encode(settings(photos, codec), tmp_path / "broken")
    assert (tmp_path / "broken" / shard_file(0)).stat().st_mtime_ns == first, (
        "what was done is not done again"
    )
    assert content_of(tmp_path / "broken") == content_of(tmp_path / "whole")
    before = files_of(tmp_path / "whole")
    encode(settings(photos, codec), tmp_path / "whole")
    assert files_of(tmp_path / "whole") == before


@pytest.mark.slow
def test_killed_then_with_other_workers_and_ranks(tmp_path: Path, codec: Path, photos: Path) -> None:
    encode(settings(photos, codec), tmp_path / "whole")

    def start(out: Path, *more: object, **environment: str) -> subprocess.Popen[bytes]:
        command = [
            kindiff_script(), "encode", out, "--data.source", photos, "--data.size", SIZE, "--autoencoder", codec,
            "--per-shard", 5, "--batch", 3, *more,
        ]  # fmt: skip
        return subprocess.Popen(list(map(str, command)), env={**one_thread(), **environment})

    killed = tmp_path / "killed"
    process = start(killed, "--workers", 2)
    while process.poll() is None and not (killed / f"{shard_file(0)}.json").is_file():
        time.sleep(0.001)
    process.kill()
    process.wait()
    assert not (killed / "manifest.json").is_file()
    assert start(killed, "--workers", 1).wait() == 0
    assert content_of(killed) == content_of(tmp_path / "whole")
    ranks = [
        start(
            tmp_path / "ranks",
            "--workers",
            1,
            RANK=str(r),
            WORLD_SIZE="2",
            LOCAL_RANK=str(r),
            LOCAL_WORLD_SIZE="2",
        )
        for r in (1, 0)
    ]
    assert [process.wait(timeout=120) for process in ranks] == [0, 0]
    assert content_of(tmp_path / "ranks") == content_of(tmp_path / "whole")


def test_a_shard_with_a_flipped_bit_is_named_and_can_be_made_again(
    tmp_path: Path, codec: Path, photos: Path, capsys
) -> None:
    config, out = settings(photos, codec), tmp_path / "latents"
    encode(config, out)
    whole = content_of(out)
    assert main(["data", "check", str(out)]) == 0
    bad = out / shard_file(2)
    content = bytearray(bad.read_bytes())
    content[-77] ^= 4
    bad.write_bytes(content)
    with pytest.raises(BadFileError, match=r"shard-00002\.npy is damaged: its SHA-256"):
        LatentSet.open(out)
    assert len(LatentSet.open(out, verify=False)) == 24, "large sets are not read through on opening"
    capsys.readouterr()
    assert main(["data", "check", str(out)]) == 1
    assert "shard-00002.npy is damaged" in capsys.readouterr().err
    assert main(["data", "check", str(out), "--json"]) == 1
    assert [fault[:60] for fault in json.loads(capsys.readouterr().out)["faults"]] == [
        f"{bad} is damaged"[:60]
    ]
    bad.unlink()
    with pytest.raises(BadFileError, match=r"shard-00002\.npy is missing"):
        LatentSet.open(out, verify=False)
    encode(config, out)
    assert content_of(out) == whole
    (photos / "chess" / "0.png").write_bytes((photos / "disc" / "0.png").read_bytes())
    for shard in ("shard-00002.npy", "shard-00001.npy"):  # of the images 5 to 14: chess's first is among them
        (out / shard).unlink()
    for _ in range(2):  # the second time it does not take the other images' shard for its own
        with pytest.raises(BadFileError, match="was made anew and is another one"):
            encode(config, out)
    (out / "shard-00001.npy").write_bytes(whole["shard-00001.npy"])
    bad.write_bytes(whole[bad.name][:-1])
    with pytest.raises(BadFileError, match=r"shard-00002\.npy has \d+ bytes, not the recorded"):
        LatentSet.open(out, verify=False)


def test_other_settings_or_images_are_refused(tmp_path: Path, codec: Path, photos: Path) -> None:
    config, out = settings(photos, codec), tmp_path / "latents"
    encode(config, out)
    for changes, named in (
        ({"per_shard": 6}, "per_shard was 5, now 6"), ({"autoencoder": "x/y"}, "autoencoder was"),
        ({"data": dataclasses.replace(config.data, per_class=2)}, r"data\.per_class was 0, now 2"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=named):
            encode(dataclasses.replace(config, **changes), out)
    (out / "manifest.json").unlink()
    with pytest.raises(UsageError, match="holds other files"):
        encode(config, out)


def test_images_that_do_not_fit_the_autoencoder(tmp_path: Path, codec: Path, photos: Path) -> None:
    config = settings(photos, codec, data=DataConfig(source=str(photos), size=18))
    with pytest.raises(UsageError, match="side 18 cannot be encoded; the side must be a multiple of 4"):
        encode(config, tmp_path / "latents")
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        encode(settings(photos, tmp_path / "nowhere"), tmp_path / "latents")
    assert not (tmp_path / "latents").exists(), "what cannot be done leaves nothing behind"


def test_classes_are_called_otherwise_by_number(tmp_path: Path, codec: Path, photos: Path) -> None:
    (tmp_path / "names.txt").write_text("n1\nn2\nn3\nn4\n")
    latents = encode(settings(photos, codec, names=str(tmp_path / "names.txt")), tmp_path / "latents")
    plain = encode(settings(photos, codec), tmp_path / "plain")
    assert latents.classes.names == ("n1", "n2", "n3", "n4")
    assert np.array_equal(latents.labels, plain.labels)
    with pytest.raises(UsageError, match=r"names imagenet has 1000 classes and .*photos 4; give as many"):
        encode(settings(photos, codec, names="imagenet"), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_unreadable_images_are_skipped_and_listed_or_stop_it(
    tmp_path: Path, codec: Path, photos: Path
) -> None:
    (photos / "chess" / "3.png").write_bytes(b"no image")
    latents = encode(settings(photos, codec), tmp_path / "latents")
    assert np.bincount(latents.labels).tolist() == [6, 5, 6, 6]
    skipped = json.loads((tmp_path / "latents" / "manifest.json").read_text())["skipped"]
    assert [entry["file"] for entry in skipped] == ["chess/3.png"]
    strict = settings(photos, codec, data=DataConfig(source=str(photos), size=SIZE, strict=True))
    for _ in range(2):
        with pytest.raises(BadFileError, match=r"chess/3\.png is no readable image"):
            encode(strict, tmp_path / "strict")
    shutil.copy(photos / "chess" / "2.png", photos / "chess" / "3.png")
    with pytest.raises(UsageError, match=r"latents of other settings \(the images themselves\)"):
        encode(strict, tmp_path / "strict")
    for picture in (photos / "disc").iterdir():
        picture.write_bytes(b"")
    with pytest.raises(UsageError, match="class 'disc' has no readable image"):
        encode(settings(photos, codec), tmp_path / "none")


def test_weights_that_are_not_finite_are_found(tmp_path: Path, codec: Path, photos: Path) -> None:
    model = Autoencoder.from_pretrained(codec)
    model.scale_C = torch.tensor([1.0, 1.0, 1.0, torch.inf])
    model.save_pretrained(tmp_path / "bad")
    with pytest.raises(BadFileError, match=r"not finite for images of shard-00000\.npy"):
        encode(settings(photos, tmp_path / "bad"), tmp_path / "latents")


def test_an_autoencoder_that_cannot_be_trained_ends_in_a_sentence(
    tmp_path: Path, photos: Path, monkeypatch
) -> None:
    monkeypatch.setattr(Autoencoder, "loss", lambda self, x, noise: self.encode(x)[0].sum() * torch.inf)
    config = settings(photos, "", steps=2, model=AutoencoderConfig(width=8))
    with pytest.raises(NotFinite, match=r"step 0 of the autoencoder: .* nothing was written"):
        encode(config, tmp_path / "latents")
    assert not (tmp_path / "latents").exists()


def test_shards_are_mapped_and_not_kept_open(tmp_path: Path, codec: Path, photos: Path) -> None:
    """A thousand open files is all that many systems allow a process; ImageNet has five thousand shards."""
    latents = encode(settings(photos, codec, per_shard=1), tmp_path / "latents")
    before = len(list(Path("/proc/self/fd").iterdir()))
    everything = latents.fetch(np.arange(24), np.zeros(24, bool))
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert len({x.tobytes() for x in everything}) == 24
    wrong = latents.path / shard_file(7)
    np.save(wrong, np.zeros((1, 2, 2, 4, 4, 4), "<f8"), allow_pickle=False)
    with pytest.raises(BadFileError, match=r"shard-00007\.npy holds float64 .* not float32"):
        dataclasses.replace(latents).fetch(np.array([7]), np.zeros(1, bool))


def test_latents_and_images_are_not_taken_for_each_other(tmp_path: Path, codec: Path, photos: Path) -> None:
    out = tmp_path / "latents"
    encode(settings(photos, codec), out)
    wanted = DataConfig(source=str(out), latent_shape=(4, 32))
    with pytest.raises(UsageError, match=r"latents of 4 channels and side 4 and latent_shape is \(4, 32\)"):
        open_samples(wanted)
    assert open_samples(dataclasses.replace(wanted, latent_shape=(4, 4))).size == 4
    with pytest.raises(UsageError, match="holds images and latent_shape asks for latents"):
        open_samples(DataConfig(source=str(photos), size=SIZE, latent_shape=(4, 4)))
    with pytest.raises(FileNotFoundError, match="do not exist; make them with `kindiff encode`"):
        open_samples(DataConfig(source=str(tmp_path / "nowhere"), latent_shape=(4, 4)))
    with pytest.raises(UsageError, match="holds latents and images are wanted"):
        encode(settings(out, codec), tmp_path / "twice")


def test_classes_groups_and_counts_of_latents(tmp_path: Path, codec: Path, photos: Path) -> None:
    latents = encode(settings(photos, codec), tmp_path / "latents")
    some = open_samples(DataConfig(source=str(latents.path), classes=("ramp", "bars"), per_class=2))
    zeros = np.zeros(4, bool)
    assert np.array_equal(some.fetch(np.arange(4), zeros), latents.fetch(np.array([18, 19, 0, 1]), zeros))
    groups = {
        "format": 1, "kind": "groups", "rule": "by hand", "splits": {},
        "groups": [
            {"name": "round", "node": "round", "similarity": 1.0, "classes": ["disc"]},
            {"name": "straight", "node": "straight", "similarity": 0.5, "classes": ["ramp", "bars"]},
        ],
    }  # fmt: skip
    checkpoint.write_json(tmp_path / "groups.json", groups)
    merged = open_samples(DataConfig(source=str(latents.path), groups=str(tmp_path / "groups.json")))
    assert merged.classes.names == ("round", "straight")
    rows = np.array([12, 18, 0, 19])  # disc; then ramp and bars by turns
    assert np.array_equal(merged.fetch(np.array([0, 6, 7, 8]), zeros), latents.fetch(rows, zeros))
    assert np.array_equal(merged.deviations(np.array([0, 6, 7, 8]), zeros), latents.deviations(rows, zeros))


def test_prepared_images_give_the_same_latents(tmp_path: Path, codec: Path, photos: Path) -> None:
    """The same pixels, from files and from a prepared set in the same order of classes."""
    write_shapes(tmp_path / "prepared", tuple(sorted(SHAPES)))
    one = encode(settings(photos, codec), tmp_path / "a")
    other = encode(settings(tmp_path / "prepared", codec), tmp_path / "b")
    assert one.sha256 == other.sha256
    assert open_prepared(tmp_path / "prepared").deviations(np.arange(1), np.zeros(1, bool)) is None


# Hugging Face data sets


@pytest.fixture
def hub(photos: Path, tmp_path: Path):
    """Builder of data sets of the same pictures, the rows shuffled."""
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    paths = sorted(photos.rglob("*.png"))
    order = np.random.default_rng(0).permutation(len(paths))
    names = sorted(SHAPES)

    def make(target: str, *, labels: str = "numbers", **more: list) -> Path:
        rows = {"image": [str(paths[i]) for i in order], **more}
        features = {"image": datasets.Image()} | {name: datasets.Value("int64") for name in more}
        if labels == "numbers":
            rows["label"] = [names.index(paths[i].parent.name) for i in order]
            features["label"] = datasets.ClassLabel(names=names)
        if labels == "text":
            rows["kind"] = [paths[i].parent.name for i in order]
            features["kind"] = datasets.Value("string")
        made = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
        if target == "two":
            made = datasets.DatasetDict({"validation": made, "test": made.select(range(3))})
        made.save_to_disk(tmp_path / target)
        return tmp_path / target

    return make


@pytest.mark.parametrize("labels", ["numbers", "text"])
def test_a_hugging_face_data_set_is_the_same_images(
    tmp_path: Path, codec: Path, photos: Path, hub, labels
) -> None:
    source = hub("set", labels=labels, extra=list(range(24)))
    images = open_images(DataConfig(source=str(source), size=SIZE))
    files = open_images(DataConfig(source=str(photos), size=SIZE))
    assert images.classes == files.classes
    assert images.counts() == files.counts()
    assert sorted(p.tobytes() for p in images.images) == sorted(p.tobytes() for p in files.images)
    latents = encode(settings(source, codec), tmp_path / "latents")
    same = encode(settings(images.path, codec), tmp_path / "same")
    assert latents.sha256 == same.sha256
    two = open_images(DataConfig(source=f"hf:{source}", size=SIZE, classes=("ramp", "disc"), per_class=2))
    assert (two.classes.names, two.counts()) == (("ramp", "disc"), [2, 2])


def test_data_sets_that_do_not_fit(tmp_path: Path, hub) -> None:
    two = hub("two")
    with pytest.raises(UsageError, match="has no split 'train'; give one of validation, test"):
        open_images(DataConfig(source=str(two), size=SIZE))
    assert len(open_images(DataConfig(source=f"hf:{two}:validation", size=SIZE))) == 24
    with pytest.raises(UsageError, match="has 0 columns of labels among image"):
        open_images(DataConfig(source=str(hub("bare", labels="none")), size=SIZE))
    with pytest.raises(UsageError, match="class 'disk' is unknown"):
        open_images(DataConfig(source=str(hub("set")), size=SIZE, classes=("disk",)))
    shutil.copytree(tmp_path / "set", tmp_path / "broken")
    (tmp_path / "broken" / "dataset_info.json").write_text("{")
    with pytest.raises(BadFileError, match="cannot be opened"):
        open_images(DataConfig(source=str(tmp_path / "broken"), size=SIZE))


def test_held_out_images_are_the_later_ones_wherever_they_lie(
    tmp_path: Path, codec: Path, photos: Path, hub
) -> None:
    """In an image folder, a data set, and what is encoded of either."""
    shapes = len(SHAPES)
    for source in (photos, hub("set")):
        whole = open_images(DataConfig(source=str(source), size=SIZE)).images.reshape(shapes, 6, -1)
        config = DataConfig(source=str(source), size=SIZE, first=4, per_class=5)
        later = open_images(config)
        assert later.counts() == [2] * shapes
        assert np.array_equal(later.images.reshape(shapes, 2, -1), whole[:, 4:])
        encoded = encode(settings(source, codec, data=config), tmp_path / f"{source.name}-later")
        everything = encode(settings(source, codec), tmp_path / f"{source.name}-all")
        places = np.flatnonzero(np.arange(24) % 6 >= 4)
        zeros = np.zeros(8, bool)
        found, expected = encoded.fetch(np.arange(8), zeros), everything.fetch(places, zeros)
        np.testing.assert_allclose(found, expected, atol=1e-5)  # the batches were others
        with pytest.raises(UsageError, match=r"none from image 6 on|no images of class .* from image 6 on"):
            open_images(dataclasses.replace(config, first=6))
        with pytest.raises(UsageError, match="from image 6 on"):
            encode(settings(source, codec, data=dataclasses.replace(config, first=6)), tmp_path / "none")
    with pytest.raises(UsageError, match="per_class is -1 and first is 0; both must be 0 or more"):
        DataConfig(per_class=-1)


def test_unreadable_rows_of_a_data_set(photos: Path, hub, capfd) -> None:
    (photos / "chess" / "3.png").write_bytes(b"no image")
    config = DataConfig(source=str(hub("set")), size=SIZE)
    images = open_images(config)
    assert images.counts() == [6, 5, 6, 6]
    row = images.skipped[0].file
    assert f"skipped {config.source}, {row},: " in capfd.readouterr().err
    with pytest.raises(BadFileError, match=f"{row}, is no readable image"):  # though the set is there already
        open_images(dataclasses.replace(config, strict=True))
    for picture in (photos / "disc").iterdir():
        picture.write_bytes(b"")
    with pytest.raises(UsageError, match="has no readable image of class disc"):
        open_images(DataConfig(source=str(hub("other", extra=list(range(24)))), size=SIZE))
