"""What the report says of a model's components, on models whose tailors are known."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from kindiff.components import factorize
from kindiff.config import DiTConfig, KindConfig
from kindiff.models import DiT
from kindiff.study.report_components import components_view, has_several, has_tailors
from random_models import noisy, noisy_dit

NAMES = ("lorelei", "planets", "moods", "clay", "notionists", "landscape", "critters")
"""Three groups of two and one alone."""


def model_of(config: DiTConfig, names: tuple[str, ...], **kind: object) -> DiT:
    dense = noisy_dit(replace(config, num_classes=len(names)), names)
    return noisy(factorize(dense, KindConfig(**{"learngene_rank": 10, "tailor_rank": 3, **kind})), seed=1)


@pytest.fixture
def related(config: DiTConfig) -> DiT:
    """Classes of a group have the same v and, but for noise, the same u."""
    model = model_of(config, NAMES)
    with torch.no_grad():
        for _, layer in model.named_matrices():
            for one, other in ((0, 4), (1, 5), (3, 6)):
                for bank in (layer.tailor_u, layer.tailor_sigma, layer.tailor_v):
                    bank[other] = bank[one]
                layer.tailor_u[other] += 0.05 * torch.randn_like(layer.tailor_u[other])
    return model


def test_related_tailors_are_called_related(related: DiT) -> None:
    shown = "".join(components_view(related, title="Parts"))
    assert "Tailors of related styles are more alike than others" in shown
    within = float(re.search(r"cosine is (\S+) within", shown).group(1))
    assert within > 0.5
    by_group = ["clay", "critters", "moods", "lorelei", "notionists", "landscape", "planets"]
    rows = re.findall(r'<text x="[^"]*" y="[^"]*" text-anchor="end" class="axis">([^<]*)<', shown)
    assert rows == ["layer 1", "layer 2", *by_group]
    assert shown.count("lorelei, lorelei: 1.00") == 1


def test_unrelated_tailors_are_not(config: DiTConfig) -> None:
    shown = "".join(components_view(model_of(config, NAMES), title="Parts"))
    assert "are not clearly more alike than others" in shown
    assert "both are near 0, so tailors share little" in shown


def test_classes_without_groups_and_models_without_tailors(config: DiTConfig, dense: DiT) -> None:
    plain = model_of(config, ("ant", "bee", "cat", "dog", "eel"))
    shown = "".join(components_view(plain, title="Parts"))
    assert "Cosine between" in shown
    assert "related styles" not in shown
    assert has_several(plain)
    soft = model_of(config, NAMES, gate="soft")
    assert has_tailors(soft)
    assert not has_several(soft)
    assert "Cosine" not in "".join(components_view(soft, title="Parts"))
    assert not has_tailors(dense)
