"""One graph under torch.compile, forward and backward, whatever classes are mixed and swapped; needs no compiler."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

from conftest import NAMES
from kindiff.components import Tailor, decompose, swap_tailor_
from kindiff.models import DiT


@pytest.fixture
def fresh_counters():
    torch._dynamo.reset()
    counters.clear()
    yield counters
    torch._dynamo.reset()


def batches(classes: int, count: int):
    """Noisy images, timesteps, ids with nulls among them, and gate ids of which some are dropped."""
    generator = torch.Generator().manual_seed(5)
    for _ in range(count):
        ids = torch.randint(0, classes + 1, (6,), generator=generator)
        dropped = torch.where(torch.rand(6, generator=generator) < 0.2, classes, ids)
        x = torch.randn(6, 3, 8, 8, generator=generator)
        yield x, torch.rand(6, generator=generator) * 1000, ids, dropped


@pytest.mark.slow
@pytest.mark.parametrize("layers", ["factored", "dense"])
def test_no_recompile_over_100_class_mixes_and_swaps(kind_model: DiT, fresh_counters, layers: str) -> None:
    parts = decompose(kind_model)
    model = parts.recombine(["cat", "eel", "ant"], layers=layers)
    eager = parts.recombine(["cat", "eel", "ant"], layers=layers)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    swaps = [("cat", "bee"), ("ant", "dog"), ("bee", "ant")]
    for i, batch in enumerate(batches(3, 100)):
        with torch.compiler.set_stance("fail_on_recompile" if i else "default"):
            out = compiled(*batch)
            out.square().mean().backward()
        if i % 30 == 0:
            expected = eager(*batch)
            torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
            expected.square().mean().backward()
            for own, other in zip(model.parameters(), eager.parameters(), strict=True):
                torch.testing.assert_close(own.grad, other.grad, rtol=1e-4, atol=1e-5)
            if swaps:
                old, new = swaps.pop(0)
                for swapped in (model, eager):
                    swap_tailor_(swapped, old, Tailor.of(parts, new), check=layers == "factored")
        model.zero_grad()
        eager.zero_grad()
    assert not swaps
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert counters["aot_autograd"] == {"total": 1, "ok": 1}


@pytest.mark.slow
def test_the_whole_decomposable_model_is_one_graph(kind_model: DiT, fresh_counters) -> None:
    compiled = torch.compile(kind_model, backend="aot_eager", fullgraph=True)
    for i, batch in enumerate(batches(len(NAMES), 100)):
        with torch.compiler.set_stance("fail_on_recompile" if i else "default"):
            compiled(*batch).square().mean().backward()
    assert counters["stats"]["unique_graphs"] == 1
