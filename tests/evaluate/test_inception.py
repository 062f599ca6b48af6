"""The Inception graph: names, shapes, values of an independent port, and where the sFID features come from."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from nets import random_state

from kindiff.checkpoint import sha256
from kindiff.errors import BadFileError
from kindiff.evaluate import weights
from kindiff.evaluate.inception import WEIGHTS_SHA256, ConvUnit, FIDInception, InceptionFeatures, Mixed, Tower

# Sorted "name shape" lines of the published file's tensors. The 472 names were compared with those that its
# published converter from the TensorFlow graph writes.
LAYOUT_SHA256 = "d84f693f2abd7fea61cb31c87d3b2f268bf707c1bae1db219afdad3363959cb0"


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return random_state(FIDInception())


@pytest.fixture(scope="module")
def features(state: dict[str, torch.Tensor]) -> InceptionFeatures:
    net = FIDInception()
    net.load_state_dict(state, strict=False)
    return InceptionFeatures(net, sha256="0" * 64)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.Generator(np.random.Philox(7)).integers(0, 256, (2, 40, 56, 3), dtype=np.uint8)


def test_names_and_shapes_are_those_of_the_published_file() -> None:
    layout = {k: tuple(v.shape) for k, v in FIDInception().state_dict().items() if "num_batches" not in k}
    assert len(layout) == 94 * 5 + 2
    # the published file has 95,628,359 bytes: these and the container's records
    assert 4 * sum(int(np.prod(shape)) for shape in layout.values()) == 95_541_568
    assert layout["fc.weight"] == (1008, 2048)
    assert layout["Mixed_6d.branch1x1.conv.weight"] == (192, 768, 1, 1)
    assert layout["Mixed_7c.branch3x3dbl_3b.conv.weight"] == (384, 384, 3, 1)
    lines = "\n".join(f"{name} {shape}" for name, shape in sorted(layout.items()))
    assert hashlib.sha256(lines.encode()).hexdigest() == LAYOUT_SHA256


def test_values_are_those_of_an_independent_port(features: InceptionFeatures, images: np.ndarray) -> None:
    # made with torch-fidelity's Inception and resize on the same weights; equal to 3e-6 (docs/numerics.md)
    found = features(images)
    expected = {
        "pool": ([0.8289135694503784, 0.0, 0.03620847687125206], 158.55082681993295),
        "spatial": ([2.752281665802002, 0.0, 0.0], 218.4093882032694),
        "logits": ([0.2710292339324951, 2.5707054138183594, -3.2169744968414307], 157.51180136294883),
    }
    assert {name: value.shape for name, value in found.items()} == {
        "pool": (2, 2048), "spatial": (2, 2023), "logits": (2, 1008),
    }  # fmt: skip
    for name, (corner, norm) in expected.items():
        np.testing.assert_allclose(found[name][0, [0, 1, -1]], corner, rtol=2e-5, atol=2e-5)
        assert np.linalg.norm(found[name].astype(np.float64)) == pytest.approx(norm, rel=1e-5)


def test_each_image_stands_for_itself(features: InceptionFeatures, images: np.ndarray) -> None:
    both, alone = features(images), features(images[1:])
    for name in both:
        np.testing.assert_allclose(both[name][1:], alone[name], rtol=1e-4, atol=1e-5)


def moved(
    features: InceptionFeatures, images: np.ndarray, layer: ConvUnit, where: tuple[object, ...]
) -> set[int]:
    """Which of the spatial features change when a layer's output changes at (image, channel, row, column)."""
    before = features(images)["spatial"][0]

    def perturb(module: torch.nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor:
        changed = output.clone()
        changed[where] += 100.0
        return changed

    handle = layer.register_forward_hook(perturb)
    after = features(images)["spatial"][0]
    handle.remove()
    return set(np.flatnonzero(np.abs(after - before) > 50).tolist())


def test_spatial_features_are_seven_channels_of_the_1x1_branch_channels_last(
    features: InceptionFeatures, images: np.ndarray
) -> None:
    net = features.net
    layer = net.get_submodule("Mixed_6d.branch1x1")
    assert isinstance(layer, ConvUnit)
    every = slice(None)
    for channel in (0, 3, 6):
        assert moved(features, images[:1], layer, (0, channel)) == set(range(channel, 2023, 7))
    assert moved(features, images[:1], layer, (0, 7)) == set()
    assert moved(features, images[:1], layer, (0, every, 2, 5)) == {(2 * 17 + 5) * 7 + c for c in range(7)}
    other = net.get_submodule("Mixed_6e.branch1x1")
    assert isinstance(other, ConvUnit)
    assert moved(features, images[:1], other, (0, every)) == set()
    assert (features(images)["spatial"] >= 0).all()  # after the activation
    assert (features(images)["spatial"] == 0).any()


def test_logits_have_no_bias(state: dict[str, torch.Tensor], features: InceptionFeatures) -> None:
    image = np.zeros((1, 32, 32, 3), dtype=np.uint8)
    found = features(image)
    assert state["fc.bias"].abs().max() > 0.1
    expected = found["pool"] @ state["fc.weight"].numpy().T
    np.testing.assert_allclose(found["logits"], expected, rtol=1e-4, atol=1e-4)


def test_average_pooling_does_not_count_padding_and_the_last_block_pools_by_the_maximum() -> None:
    def pooled(kind: str, x: torch.Tensor) -> torch.Tensor:
        return Mixed(1, (Tower(pool=kind),))(x)

    assert torch.equal(pooled("avg", torch.ones(1, 1, 5, 5)), torch.ones(1, 1, 5, 5))
    spot = torch.zeros(1, 1, 5, 5)
    spot[0, 0, 2, 2] = 9.0
    assert pooled("max", spot)[0, 0, 1:4, 1:4].eq(9).all()
    assert pooled("max/2", spot).shape == (1, 1, 2, 2)
    pools = {
        name: block.towers[-1].pool
        for name, block in FIDInception().named_children()
        if isinstance(block, Mixed)
    }
    assert [name for name, pool in pools.items() if pool == "max"] == ["Mixed_7c"]
    assert [name for name, pool in pools.items() if pool == "max/2"] == ["Mixed_6a", "Mixed_7a"]


def test_weights_load_from_a_file_of_the_published_layout(
    tmp_path: Path, state: dict[str, torch.Tensor], features: InceptionFeatures, images: np.ndarray
) -> None:
    path = tmp_path / "weights.pth"
    torch.save(state, path)
    loaded = InceptionFeatures.load(path, sha256=sha256(path))
    np.testing.assert_array_equal(loaded(images)["pool"], features(images)["pool"])
    assert loaded.sha256 == sha256(path)
    assert loaded.distance_name != "FID"  # only the published weights make an FID
    assert InceptionFeatures(features.net, sha256=WEIGHTS_SHA256).distance_name == "FID"
    with pytest.raises(BadFileError, match=r"SHA-256 .* 6726825d0af5f729... is expected"):
        InceptionFeatures.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s.pop("Mixed_7c.branch1x1.conv.weight"),
            "lacks the tensor 'Mixed_7c.branch1x1.conv.weight'",
        ),
        (lambda s: s.update(extra=torch.zeros(1)), "extra tensor 'extra'"),
        (lambda s: s.update({"fc.weight": torch.zeros(1000, 2048)}), r"'fc.weight' has shape \(1000, 2048\)"),
    ],
)
def test_weights_of_another_network_are_refused(
    tmp_path: Path, state: dict[str, torch.Tensor], change: object, message: str
) -> None:
    other = dict(state)
    change(other)  # type: ignore[operator]
    torch.save(other, tmp_path / "w.pth")
    with pytest.raises(BadFileError, match=message):
        InceptionFeatures.load(tmp_path / "w.pth", sha256=None)


def test_broken_weights_are_one_sentence(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    path = tmp_path / "w.pth"
    with pytest.raises(FileNotFoundError, match="does not exist"):
        InceptionFeatures.load(path)
    torch.save({"a": 1}, path)
    with pytest.raises(BadFileError, match="no state dict"):
        InceptionFeatures.load(path, sha256=None)
    torch.save({"fc.bias": state["fc.bias"]}, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(BadFileError, match="cannot be read"):
        InceptionFeatures.load(path, sha256=None)


def test_a_download_is_checked_kept_and_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KINDIFF_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "source.bin"
    source.write_bytes(b"weights")
    right = hashlib.sha256(b"weights").hexdigest()
    with pytest.raises(BadFileError, match="is expected"):
        weights.download(source.as_uri(), "0" * 64, "w.bin")
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []
    path = weights.download(source.as_uri(), right, "w.bin")
    assert path.read_bytes() == b"weights"
    source.unlink()
    assert weights.download(source.as_uri(), right, "w.bin") == path
    path.write_bytes(b"tampered")
    with pytest.raises(BadFileError, match="is expected"):
        weights.download(source.as_uri(), right, "w.bin")
    with pytest.raises(OSError, match="cannot be downloaded"):
        weights.download((tmp_path / "none").as_uri(), right, "other.bin")
