"""The features' interface, the resizes and EfficientNet-Lite0."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from matplotlib import cbook
from PIL import Image

from kindiff.errors import BadFileError, UsageError
from kindiff.evaluate import lite0
from kindiff.evaluate.features import CallableFeatures, extract, resize_half_pixel, resize_tf1, to_tensor
from kindiff.evaluate.lite0 import Lite0, Lite0Features, SameConv, installed
from kindiff.evaluate.weights import load_into, load_state


@pytest.fixture(scope="module")
def features() -> Lite0Features:
    return Lite0Features.load()


def row(values: list[float]) -> torch.Tensor:
    return torch.tensor(values)[None, None, None, :].expand(1, 1, len(values), -1)


def test_tf1_resize_looks_at_i_times_in_over_out() -> None:
    assert resize_tf1(row([0.0, 8.0]), 4)[0, 0, 0].tolist() == [0, 4, 8, 8]
    assert resize_tf1(row([0.0, 1.0, 2.0, 3.0]), 2)[0, 0, 0].tolist() == [0, 2]  # no antialiasing
    assert resize_tf1(row([0.0, 1.0, 2.0, 3.0]), 4)[0, 0, 0].tolist() == [0, 1, 2, 3]
    x = torch.rand(1, 2, 5, 9)
    torch.testing.assert_close(resize_tf1(x, 7).mT, resize_tf1(x.mT, 7))  # height and width alike


def test_half_pixel_resize_is_pillows_bilinear() -> None:
    image = np.random.default_rng(0).integers(0, 256, (50, 50), dtype=np.uint8)
    for size in (20, 120):
        expected = np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR))
        found = resize_half_pixel(to_tensor(image[None, :, :, None]), size)[0, 0].numpy()
        assert np.abs(found - expected).max() < 1.01  # Pillow rounds to integers, twice


def test_same_padding_puts_the_odd_cell_at_the_bottom_right() -> None:
    conv = SameConv(1, 1, 3, stride=2)
    conv.weight.data.zero_()[0, 0, 0, 0] = 1.0  # the top left tap
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert conv(x)[0, 0].tolist() == [[0, 2], [8, 10]]  # nothing is padded on the top and the left
    odd = SameConv(1, 1, 3, stride=2)
    odd.weight.data.zero_()[0, 0, 0, 0] = 1.0
    assert odd(torch.ones(1, 1, 5, 5))[0, 0].tolist() == [[0, 0, 0], [0, 1, 1], [0, 1, 1]]


def test_lite0_takes_a_uniform_for_a_uniform(features: Lite0Features) -> None:
    # matplotlib's portrait of Rear Admiral Hopper: ImageNet class 652 is "military uniform"
    with Image.open(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)) as image:
        square = np.asarray(image.convert("RGB").crop((0, 44, 512, 556)))
    pool = features(square[None])["pool"]
    assert pool.shape == (1, 1280)
    logits = features.net._fc(torch.from_numpy(pool))
    assert int(logits.argmax()) == 652


def test_lite0_is_never_called_fid(features: Lite0Features) -> None:
    assert features.distance_name == "FD (Lite0)"
    assert features.sha256 == lite0.WEIGHTS_SHA256


def test_lite0_of_an_image_does_not_depend_on_its_batch(features: Lite0Features) -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    whole = features(images)["pool"]
    parts = np.concatenate([features(images[:1])["pool"], features(images[1:])["pool"]])
    np.testing.assert_allclose(parts, whole, rtol=1e-4, atol=2e-5)


def test_lite0_is_the_network_as_published(features: Lite0Features) -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    net = Lite0()  # with its batch norms and a whole batch at once
    load_into(net, load_state(installed()), installed())
    inputs = (resize_half_pixel(to_tensor(images), 224) - 127.0) / 128.0
    with torch.no_grad():
        expected = net.eval()(inputs).numpy()
    np.testing.assert_allclose(features(images)["pool"], expected, rtol=1e-4, atol=2e-5)


def test_other_weights_and_a_missing_package_are_refused(
    tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "w.pth"  # type: ignore[operator]
    torch.save({}, path)
    with pytest.raises(BadFileError, match="is expected"):
        Lite0Features.load(path)
    monkeypatch.setattr(lite0, "PACKAGE", "no_such_package_here")
    with pytest.raises(UsageError, match=r"pip install 'kindiff\[lite0\]'"):
        Lite0Features.load()


def test_a_users_function_is_a_feature_network() -> None:
    own = CallableFeatures(name="mean colour", function=lambda x: {"pool": x.mean((1, 2))}, version="1")
    images = np.full((2, 4, 4, 3), 7, dtype=np.uint8)
    found = extract(own, images)
    assert found["pool"].tolist() == [[7, 7, 7]] * 2
    assert found["pool"].dtype == np.float32
    assert own.distance_name == "FD (mean colour)"
    other = CallableFeatures(name="mean colour", function=own.function, version="2")
    assert other.sha256 != own.sha256


@pytest.mark.parametrize(
    ("function", "images", "message"),
    [
        (lambda x: {"pool": np.full((len(x), 3), np.nan)}, np.zeros((2, 4, 4, 3), np.uint8), "infinite for image 10"),
        (lambda x: {"pool": np.array([[1.0], [np.inf]])}, np.zeros((2, 4, 4, 3), np.uint8), "for image 11"),
        (lambda x: {"other": np.zeros((len(x), 3))}, np.zeros((2, 4, 4, 3), np.uint8), "'pool' is needed"),
        (lambda x: {"pool": np.zeros((len(x), 3))}, np.zeros((2, 4, 4, 3)), "float64 of shape"),
        (lambda x: {"pool": np.zeros((len(x), 3))}, np.zeros((2, 3, 4, 4), np.uint8), "expected: uint8"),
    ],
)  # fmt: skip
def test_bad_features_and_images_are_refused(function: object, images: np.ndarray, message: str) -> None:
    own = CallableFeatures(name="own", function=function, version="1")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=message):
        extract(own, images, first=10)


def test_convolutions_of_features_are_not_rounded_to_tf32() -> None:
    seen = []

    def network(images: np.ndarray) -> dict[str, np.ndarray]:
        seen.append(torch.backends.cudnn.conv.fp32_precision)
        return {"pool": np.zeros((len(images), 2), np.float32)}

    before = torch.backends.cudnn.conv.fp32_precision
    extract(CallableFeatures(name="x", function=network, version="1"), np.zeros((2, 4, 4, 3), np.uint8))
    assert seen == ["ieee"]
    assert torch.backends.cudnn.conv.fp32_precision == before != "ieee"
