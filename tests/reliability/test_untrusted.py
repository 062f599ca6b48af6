"""Files from strangers: what they claim is checked before anything is made or allocated for it."""

from __future__ import annotations

import json
import os
import shutil
import time
import tracemalloc
from pathlib import Path

import pytest
import torch

from kindiff import checkpoint
from kindiff.components import Components, decompose, load_components, save_components
from kindiff.config import AutoencoderConfig, DataConfig, EncodeConfig
from kindiff.data.latents import LatentSet
from kindiff.errors import BadFileError
from kindiff.models import DiT
from kindiff.models.autoencoder import Autoencoder
from kindiff.train.encoding import encode
from kindiff.train.run import GROUPS, Run, _read
from toys import write_shapes


@pytest.fixture
def model_folder(kind_model: DiT, tmp_path: Path) -> Path:
    kind_model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def parts_folder(kind_model: DiT, tmp_path: Path) -> Path:
    parts: Components = decompose(kind_model)
    save_components(parts, tmp_path / "parts")
    return tmp_path / "parts"


def edit(path: Path, section: str, key: str, value: object) -> None:
    content = json.loads(path.read_text())
    (content[section] if section else content)[key] = value
    path.write_text(json.dumps(content))


HUGE = [
    ("model", "width", 2**40), ("model", "depth", 2**40), ("model", "depth", 500), ("model", "input_size", 2**30),
    ("model", "input_size", 8192), ("model", "num_classes", 2**50), ("model", "heads", 2**33),
    ("model", "channels", 2**31),
    ("model", "mlp_ratio", 1e300), ("model", "mlp_ratio", float("nan")), ("model", "mlp_ratio", -4.0),
]  # fmt: skip


@pytest.mark.parametrize(("section", "key", "value"), HUGE)
def test_absurd_dimensions_are_one_sentence(
    model_folder: Path, parts_folder: Path, section, key, value
) -> None:
    for folder, read in ((model_folder, DiT.from_pretrained), (parts_folder, load_components)):
        edit(folder / "config.json", section, key, value)
        began = time.monotonic()
        with pytest.raises(BadFileError) as caught:
            read(folder)
        assert time.monotonic() - began < 1
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("key", "value"), [("slots", 2**60), ("tailor_rank", 2**40), ("gate_width", 2**40)])
def test_absurd_structures_too(model_folder: Path, key, value) -> None:
    edit(model_folder / "config.json", "structure", key, value)
    with pytest.raises(BadFileError, match=r"config\.json"):
        DiT.from_pretrained(model_folder)


def with_header(path: Path, change) -> None:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].decode().strip()
    changed = change(header).encode()
    path.write_bytes(len(changed).to_bytes(8, "little") + changed + content[8 + length :])


def entry(**changes: object):
    def change(header: str) -> str:
        value = json.loads(header)
        name = next(n for n in value if n != "__metadata__")
        value[name] |= changes
        return json.dumps(value)

    return change


@pytest.mark.parametrize(
    "change",
    [
        entry(shape=[2**40, 2**40]),
        entry(shape=[-1]),
        entry(shape=[True]),
        entry(shape=[1] * 100),
        entry(shape="big"),
        entry(data_offsets=[0, 2**62]),
        entry(data_offsets=[8, 0]),
        entry(data_offsets=[0]),
        entry(dtype="F16"),
        lambda header: header.replace("{", '{"__metadata__": {}, "__metadata__": {}, ', 1),
        lambda header: "[" * 100_000,
        lambda header: "[]",
        lambda header: "{}",
    ],
)
def test_headers_are_checked_against_the_file(model_folder: Path, change) -> None:
    path = model_folder / "model.safetensors"
    with_header(path, change)
    for read in (checkpoint.read_header, checkpoint.read_tensors):
        with pytest.raises(BadFileError, match=r"model\.safetensors is damaged") as caught:
            read(path)
        assert len(str(caught.value)) < 400


def test_links_out_of_a_directory_are_refused(parts_folder: Path, model_folder: Path, tmp_path: Path) -> None:
    """A parts directory from a stranger whose files are links would show, and pass on, files of our own."""
    secret = tmp_path / "secret"
    secret.mkdir()
    for path in (
        parts_folder / "tailors" / "cat.safetensors", parts_folder / "config.json", model_folder / "model.safetensors",
    ):  # fmt: skip
        path.rename(secret / path.name)
        path.symlink_to(secret / path.name)
        read = DiT.from_pretrained if model_folder in path.parents else load_components
        with pytest.raises(BadFileError, match="is a link out of its directory"):
            read(model_folder if model_folder in path.parents else parts_folder)
        path.unlink()
        (secret / path.name).rename(path)
    shutil.move(parts_folder / "tailors", secret / "tailors")
    (parts_folder / "tailors").symlink_to(secret / "tailors")
    with pytest.raises(BadFileError, match="is a link out of its directory"):
        load_components(parts_folder)


def test_links_of_the_hubs_cache_are_followed(parts_folder: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    for number, path in enumerate(p for p in sorted(parts_folder.rglob("*")) if p.is_file()):
        shutil.copy(path, blobs / str(number))
        link = snapshot / path.relative_to(parts_folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blobs / str(number), link.parent))
    assert load_components(snapshot).classes == load_components(parts_folder).classes


def test_what_is_no_file_is_not_read(model_folder: Path) -> None:
    path = model_folder / "model.safetensors"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(FileNotFoundError):
        DiT.from_pretrained(model_folder)
    (model_folder / "config.json").unlink()
    (model_folder / "config.json").symlink_to("/dev/zero")
    with pytest.raises((BadFileError, FileNotFoundError)):
        DiT.from_pretrained(model_folder)


def test_a_manifest_of_latents_is_checked_like_any_other(tmp_path: Path) -> None:
    """Found by the campaign's fuzzing: counts, classes and the autoencoder were believed."""
    write_shapes(tmp_path / "images", per_class=1)
    Autoencoder(AutoencoderConfig(width=8)).save_pretrained(tmp_path / "codec")
    data = DataConfig(source=str(tmp_path / "images"), size=16)
    encode(EncodeConfig(data=data, autoencoder=str(tmp_path / "codec")), tmp_path / "latents")
    path = tmp_path / "latents" / "manifest.json"
    whole = path.read_text()
    assert len(LatentSet.open(path.parent)) == 4
    two, one = {"name": "a", "count": 2}, {"name": "b", "count": 1}
    shard = json.loads(whole)["shards"][0]
    for key, value in (
        ("classes", 4), ("classes", "abcd"), ("classes", [two, one]), ("classes", [two, two | {"name": 4}]),
        ("classes", [two, two | {"count": "2"}]), ("classes", [two, one, one]), ("autoencoder", None),
        ("classes", [two, two | {"name": "\ud800"}]), ("classes", [two | {"count": 5}, one | {"count": -1}]),
        ("shards", []), ("shards", [shard | {"rows": 5}]), ("shards", [shard | {"rows": -4}]), ("side", 0),
        ("shards", [shard | {"sha256": "0" * 64}]), ("channels", 2**40), ("sha256", "0" * 64), ("dtype", "object"),
    ):  # fmt: skip
        edit(path, "", key, value)
        with pytest.raises(BadFileError, match=r"manifest\.json is damaged"):
            LatentSet.open(path.parent)
        path.write_text(whole)


def test_a_tailor_whose_sigma_is_one_number(parts_folder: Path) -> None:
    """Found by the campaign's fuzzing: a shape of no dimension has as many bytes as one of [1]."""
    path = parts_folder / "tailors" / "cat.safetensors"
    tensors = {name: tensor.clone() for name, tensor in checkpoint.read_tensors(path).items()}
    with checkpoint.open_tensors(path) as file:
        metadata = file.metadata()
    path.unlink()  # what was read may still be the file itself, mapped
    checkpoint.write_tensors(path, tensors | {"blocks.0.q.sigma": torch.tensor(1.0)}, metadata)
    with pytest.raises(BadFileError, match=r"cat\.safetensors is of another architecture"):
        load_components(parts_folder)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b'{"format": [' + b"[]," * 2_200_000 + b"[]]}", "values are more than a description"),
        (b'{"format": [' + b"1," * 1_000_000 + b"1]}", "1000002 values are more than a description of 2000"),
        (b'{"format": "' + "\U0001f989".encode() + b"a" * 4_000_000 + b'"}', "letters beyond ASCII"),
    ],
)
def test_a_description_that_would_become_larger_than_twice_itself_is_refused_unparsed(
    model_folder: Path, content: bytes, sentence: str
) -> None:
    """Three bytes of text make an object of sixty, and one letter makes a text four times as large."""
    path = model_folder / "config.json"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(BadFileError, match=sentence):
            DiT.from_pretrained(model_folder)
        assert tracemalloc.get_traced_memory()[1] < 2 * path.stat().st_size
    finally:
        tracemalloc.stop()


def test_a_checkpoint_whose_step_is_infinite(tmp_path: Path) -> None:
    """Found by the guided campaign: int(Infinity) is an OverflowError, which nothing expected."""
    tensors = {group: {"x": torch.zeros(3)} for group in GROUPS}
    Run(tmp_path / "run", {"seed": 1}).save(5, tensors)
    place = tmp_path / "run" / "checkpoints" / "step-00000005"
    edit(place / "state.json", "", "step", float("inf"))
    with pytest.raises(BadFileError, match=r"state\.json is damaged"):
        _read(place)
