"""A tailor swapped into a model's slot gives the model that recombining gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from conftest import NAMES, randomised
from kindiff.classes import ClassSet
from kindiff.components import (
    Components,
    Tailor,
    decompose,
    factorize,
    load_components,
    load_tailor,
    save_components,
    swap_tailor_,
)
from kindiff.config import KindConfig
from kindiff.errors import BadFileError, UsageError
from kindiff.models import DiT
from toys import assert_same_tensors


@pytest.fixture
def parts(kind_model: DiT) -> Components:
    return decompose(kind_model)


@pytest.mark.parametrize("layers", ["factored", "dense"])
def test_swapped_equals_recombined_to_the_bit(parts: Components, inputs, layers) -> None:
    x, t, _ = inputs
    ids = torch.tensor([0, 1, 2, 0, 1, 2, 0])
    model = parts.recombine(["cat", "eel"], layers=layers)
    places = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    assert swap_tailor_(model, "cat", Tailor.of(parts, "dog"), check=layers == "factored") is model
    anew = parts.recombine(["dog", "eel"], layers=layers)
    assert model.classes == anew.classes == ClassSet(("dog", "eel"))
    assert_same_tensors(model.state_dict(), anew.state_dict())
    assert torch.equal(model(x, t, ids), anew(x, t, ids))
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == places
    assert_same_tensors(
        decompose(parts.recombine(["dog"])).tailors["dog"], parts.tailors["dog"]
    )  # the parts were not touched


def test_a_tailor_is_read_alone(parts: Components, tmp_path: Path) -> None:
    save_components(parts, tmp_path / "parts")
    model = load_components(tmp_path / "parts", ["ant"]).recombine()
    (tmp_path / "parts" / "learngenes.safetensors").unlink()
    swap_tailor_(model, "ant", load_tailor(tmp_path / "parts", "bee"))
    assert_same_tensors(model.state_dict(), parts.recombine(["bee"]).state_dict())
    with pytest.raises(UsageError, match="class 'yak' is unknown"):
        load_tailor(tmp_path / "parts", "yak")
    path = tmp_path / "parts" / "tailors" / "cat.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(BadFileError, match=r"cat\.safetensors is damaged"):
        load_tailor(tmp_path / "parts", "cat")


def test_a_smaller_tailor_is_padded(parts: Components, inputs) -> None:
    x, t, _ = inputs
    ids = torch.zeros(7, dtype=torch.int64)
    small = {
        name: tensor if name == "class_embed" else tensor[:1] for name, tensor in parts.tailors["bee"].items()
    }
    few = Components(parts.config, parts.targets, parts.learngenes, {**parts.tailors, "bee": small})
    model = swap_tailor_(parts.recombine(["cat"]), "cat", Tailor.of(few, "bee"))
    torch.testing.assert_close(model(x, t, ids), few.recombine(["bee"])(x, t, ids), rtol=0, atol=1e-5)
    with pytest.raises(UsageError, match="recombine with the largest tailor first"):
        swap_tailor_(few.recombine(["bee"]), "bee", Tailor.of(parts, "cat"))


def test_requests_that_cannot_be_met_change_nothing(parts: Components, dense: DiT) -> None:
    model = parts.recombine(["cat", "eel"])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    dog = Tailor.of(parts, "dog")
    other = decompose(randomised(factorize(dense, KindConfig(learngene_rank=10, tailor_rank=3)), seed=9))
    narrow = decompose(factorize(dense, KindConfig(learngene_rank=10, tailor_rank=3, targets=("q",))))
    for swap, sentence in (
        (lambda: swap_tailor_(model, "ant", dog), "class 'ant' is unknown"),
        (lambda: swap_tailor_(model, "cat", Tailor.of(parts, "eel")), "'eel'"),
        (lambda: swap_tailor_(model, "cat", Tailor.of(other, "dog")), "belongs to other learngenes"),
        (lambda: swap_tailor_(narrow.recombine(["cat"]), "cat", dog), r"no tailor slot for 'blocks\.0\.k"),
        (
            lambda: swap_tailor_(dense, "cat", Tailor("yak", dog.tensors, dog.learngenes)),
            "no tailor slot of its own",
        ),
        (
            lambda: swap_tailor_(parts.recombine(["cat"], layers="merged"), "cat", dog),
            "no tailor slot of its",
        ),
        (
            lambda: swap_tailor_(parts.with_new_tailors(["x", "y"], rank=3, share="task"), "x", dog),
            "no tailor slot of its own",
        ),
        (
            lambda: swap_tailor_(parts.recombine(["cat"], learngene_rank=4, layers="factored"), "cat", dog),
            "holds fewer components",
        ),
        (lambda: Tailor.of(parts, "yak"), "class 'yak' is unknown"),
    ):
        with pytest.raises(UsageError, match=sentence):
            swap()
    assert_same_tensors(model.state_dict(), before)
    assert model.classes.names == ("cat", "eel")
    assert set(NAMES) == set(parts.classes)


def test_taking_over_gives_the_same_model_and_copying_shares_nothing(parts: Components) -> None:
    for layers in ("factored", "dense", "merged"):
        copied = parts.recombine(["cat"], layers=layers)
        own = {tensor.data_ptr() for tensor in parts.learngenes.values()}
        own |= {tensor.data_ptr() for tailor in parts.tailors.values() for tensor in tailor.values()}
        assert not own & {tensor.data_ptr() for tensor in copied.state_dict().values()}
        again = Components(parts.config, parts.targets, dict(parts.learngenes), parts.tailors)
        taken = again.recombine(["cat"], layers=layers, take_over=True)
        assert_same_tensors(taken.state_dict(), copied.state_dict())
        assert own & {tensor.data_ptr() for tensor in taken.state_dict().values()}
