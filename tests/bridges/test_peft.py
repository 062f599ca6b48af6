"""peft's own get_peft_model on our models, unchanged: train, save, load, merge."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from kindiff.components import decompose, factorize
from kindiff.config import DiTConfig, KindConfig
from kindiff.models import DiT
from random_models import noisy, noisy_dit

NAMES = ("ant", "bee", "cat")
TARGETS = ["q", "k", "v", "o", "mlp_in", "mlp_out"]


@pytest.fixture(scope="module")
def peft():
    return pytest.importorskip("peft")


def dense() -> DiT:
    config = DiTConfig(input_size=8, channels=3, num_classes=3, width=32, depth=2, heads=4, patch=2)
    return noisy_dit(config, NAMES)


def recombined(layers: str) -> DiT:
    parts = decompose(noisy(factorize(dense(), KindConfig(learngene_rank=20, tailor_rank=3)), 1, 0.02))
    return parts.recombine(["bee"], layers=layers)


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return x, torch.tensor([1.0, 250.0, 500.0, 999.0]), torch.tensor([0, 0, 1, 0])


def trained(peft, model: DiT, config) -> torch.nn.Module:
    """Five Adam steps of a LoRA; the base stays as it was."""
    tuned = peft.get_peft_model(model, config)
    x, t, ids = inputs()
    optimiser = torch.optim.Adam([p for p in tuned.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        loss = (tuned(x, t, ids) - x).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    return tuned.eval()


@pytest.mark.parametrize("make", [dense, lambda: recombined("merged")], ids=["dense", "merged"])
@pytest.mark.parametrize("method", ["LoraConfig", "OFTConfig"])
def test_a_tuner_trains_saves_loads_and_merges(peft, tmp_path: Path, make, method: str) -> None:
    model = make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    settings = {"r": 4} if method == "LoraConfig" else {"oft_block_size": 8, "use_cayley_neumann": False}
    tuned = trained(peft, model, getattr(peft, method)(target_modules=TARGETS, **settings))
    names = {
        name.split("lora_")[0] for name, p in tuned.named_parameters() if p.requires_grad and "lora_" in name
    }
    assert len(names) == (12 if method == "LoraConfig" else 0)
    with torch.no_grad():
        expected = tuned(*inputs())
    tuned.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(make(), tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(*inputs()), expected, rtol=0, atol=1e-6)
    merged = tuned.merge_and_unload()
    assert isinstance(merged, DiT)
    with torch.no_grad():
        torch.testing.assert_close(merged(*inputs()), expected, rtol=0, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    whole = DiT.from_pretrained(tmp_path / "merged")
    assert any(not torch.equal(tensor, before[name]) for name, tensor in whole.state_dict().items())
    with torch.no_grad():
        assert torch.equal(whole(*inputs()), merged(*inputs()))


@pytest.mark.parametrize("layers", ["factored", "dense"])
def test_a_model_of_components_is_tuned_where_it_is_dense(peft, layers: str) -> None:
    """Factored matrices are no nn.Linear; LoRA reaches the modulations and the final layer beside them."""
    model = recombined(layers)
    with pytest.raises(ValueError, match="not supported"):
        peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(target_modules=TARGETS))
    tuned = trained(peft, model, peft.LoraConfig(r=4, target_modules=["modulation", "final.out"]))
    with torch.no_grad():
        expected = tuned(*inputs())
        torch.testing.assert_close(tuned.merge_and_unload()(*inputs()), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("layers", "leaves"), [("factored", ("u", "v")), ("dense", ("weight",))])
def test_lora_reaches_the_matrices_of_a_recombined_model(peft, tmp_path: Path, layers: str, leaves) -> None:
    """By parameter: peft's LoRA on learngenes, with several classes and their tailors in place."""

    def make() -> DiT:
        parts = decompose(noisy(factorize(dense(), KindConfig(learngene_rank=20, tailor_rank=3)), 1, 0.02))
        return parts.recombine(["bee", "ant"], layers=layers)

    names = [f"{name}.{leaf}" for name, _ in make().named_matrices() for leaf in leaves]
    before = make()(*inputs())
    tuned = trained(peft, make(), peft.LoraConfig(r=4, target_modules=[], target_parameters=names))
    with torch.no_grad():
        expected = tuned(*inputs())
        assert (expected - before).abs().max() > 1e-3
        tuned.save_pretrained(tmp_path / "adapter")
        again = peft.PeftModel.from_pretrained(make(), tmp_path / "adapter").eval()
        torch.testing.assert_close(again(*inputs()), expected, rtol=0, atol=1e-6)
        merged = tuned.merge_and_unload()
        torch.testing.assert_close(merged(*inputs()), expected, rtol=0, atol=1e-4)
        merged.save_pretrained(tmp_path / "merged")
        assert torch.equal(DiT.from_pretrained(tmp_path / "merged")(*inputs()), merged(*inputs()))
    if layers == "factored":
        assert decompose(merged).classes == ("bee", "ant")
