"""Costs against published figures, torch's own counter, and the paper's headline arithmetic."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kindiff.classes import numbered
from kindiff.cli.inspect import report
from kindiff.components import decompose, factorize
from kindiff.components.build import Structure, empty
from kindiff.config import BackboneConfig, DesignConfig, DiTConfig, KindConfig, load_recipe
from kindiff.errors import UsageError
from kindiff.evaluate.cost import closed_macs, cost_table, counted_macs, total
from kindiff.evaluate.design import design
from kindiff.models import DiT

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("name", "published"), [("DiT-S/2", 6.06), ("DiT-B/2", 23.01), ("DiT-L/2", 80.71), ("DiT-XL/2", 118.64)]
)
def test_dense_macs_are_the_published_ones(name, published) -> None:
    config = DiTConfig.preset(name, num_classes=1000, objective="epsilon")
    with torch.device("meta"):
        counted = counted_macs(DiT(config))
    assert counted == sum(closed_macs(config).values())
    assert counted / 1e9 == pytest.approx(published, rel=0.005)


@pytest.mark.parametrize("gate", ["class", "soft"])
@pytest.mark.parametrize("targets", [("q", "k", "v", "o", "mlp_in", "mlp_out"), ("v", "mlp_out")])
def test_closed_formulas_are_what_the_counter_sees(dense, gate, targets) -> None:
    model = factorize(dense, KindConfig(learngene_rank=7, tailor_rank=3, gate=gate, targets=targets))
    assert counted_macs(model) == total(cost_table(model)).macs
    parts = decompose(model)
    for layers in ("factored", "dense", "merged"):
        small = parts.recombine(["cat"], layers=layers)
        table = total(cost_table(small))
        assert counted_macs(small) == table.macs
        assert table.parameters == sum(p.numel() for p in small.parameters())


def test_macs_do_not_depend_on_the_number_of_classes() -> None:
    def macs(classes: int) -> int:
        config = DiTConfig.preset("DiT-T/2", num_classes=classes)
        with torch.device("meta"):
            return counted_macs(
                empty(config, numbered(classes), Structure(rank=8, tailor_rank=2, slots=classes))
            )

    assert macs(1) == macs(500)


def test_headline_accounting_of_the_paper() -> None:
    """DiT-L/2: 102 fresh components a matrix and the biases are 45.4M trainable; rank 366 saves 35.4 GMAC."""
    facts = report(ROOT / "recipes" / "designs" / "dit-l-2-transfer.toml")
    assert facts["total"]["trainable"] / 1e6 == pytest.approx(45.4, abs=0.05)
    assert (facts["dense"]["macs"] - facts["total"]["macs"]) / 1e9 >= 35.4
    model = design(load_recipe(ROOT / "recipes" / "designs" / "dit-l-2-transfer.toml", DesignConfig))
    assert counted_macs(model) == facts["total"]["macs"]
    assert facts["dense"]["macs"] == counted_macs(
        design(DesignConfig(model=BackboneConfig(preset="DiT-L/2")))
    )


def test_a_design_of_a_mixture_trains_weights_alone() -> None:
    config = DesignConfig(
        model=BackboneConfig(preset="DiT-B/2"), classes=10, learngene_rank=192, tailor_rank=13, trains="tailors",
        mixes=8,
    )  # fmt: skip
    model = design(config)
    assert total(cost_table(model)).trainable == 10 * (12 * 6 + 1) * 8
    assert total(cost_table(model)).macs == counted_macs(model)
    for wrong in ({"trains": "all"}, {"tailor_rank": 0}, {"mixes": -1}):
        with pytest.raises(UsageError, match=r"mixes .* does not fit"):
            replace(config, **wrong)
