"""peft's part: what a missing library says, what it refuses, and which of its other tuners need one line only."""

from __future__ import annotations

import sys

import pytest
import torch

from kindiff.classes import ClassSet
from kindiff.config import DiTConfig, RivalConfig
from kindiff.errors import UsageError
from kindiff.rivals import start
from kindiff.rivals.base import densified
from kindiff.rivals.tuners import TARGETS, tuner
from random_models import noisy_dit

CONFIG = DiTConfig(input_size=8, channels=3, num_classes=3, width=32, depth=2, heads=2, patch=4)
NAMES = ClassSet(("ant", "bee"))

# peft's tuners that are no row of the comparison and would be, with these settings: docs/rivals.md names them.
OTHERS: dict[str, dict[str, object]] = {
    "C3AConfig": {"block_size": 8}, "DeftConfig": {}, "DeloraConfig": {},
    "FourierFTConfig": {"n_frequency": 50}, "GraloraConfig": {"r": 8, "gralora_k": 4}, "HiraConfig": {},
    "OSFConfig": {}, "PeanutConfig": {}, "PsoftConfig": {}, "PveraConfig": {}, "RandLoraConfig": {},
    "TinyLoraConfig": {}, "UniLoraConfig": {}, "VBLoRAConfig": {"num_vectors": 64, "vector_length": 16},
    "WaveFTConfig": {"n_frequency": 50},
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_tuners_come_free(name: str) -> None:
    peft = pytest.importorskip("peft")
    if not hasattr(peft, name):
        pytest.skip(f"this peft has no {name}")
    torch.manual_seed(0)
    rival = tuner(
        lambda peft, config, seed: getattr(peft, name)(target_modules=TARGETS, **OTHERS[name]), keeps=1
    )
    model = rival.wrap(noisy_dit(CONFIG, ("a", "b", "c")), RivalConfig(), 0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape)
    assert {key for key, p in model.named_parameters() if p.requires_grad} > {"class_embed.weight"}
    model.double()
    x, t, ids = torch.randn(4, 3, 8, 8).double(), torch.rand(4) * 1000, torch.tensor([0, 1, 2, 3])
    with torch.no_grad():
        torch.testing.assert_close(
            densified(model, rival.weight)(x, t, ids), model.eval()(x, t, ids), rtol=1e-5, atol=1e-5
        )


def test_without_peft_the_extra_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"pip install 'kindiff\[peft\]'"):
        start(noisy_dit(CONFIG), NAMES, RivalConfig(), seed=0)


@pytest.mark.parametrize("method", ["oft", "boft"])
def test_a_block_that_does_not_divide_the_width(method: str) -> None:
    with pytest.raises(UsageError, match=rf"{method} cuts inputs into blocks of side 5"):
        start(noisy_dit(CONFIG), NAMES, RivalConfig(method=method, rank=5), seed=0)


def test_what_peft_refuses_is_one_sentence(monkeypatch) -> None:
    monkeypatch.setattr("kindiff.rivals.tuners.TARGETS", "no_such_layer")
    with pytest.raises(UsageError, match=r"peft refuses lora with rank 8: .*no_such_layer"):
        start(noisy_dit(CONFIG), NAMES, RivalConfig(), seed=0)
