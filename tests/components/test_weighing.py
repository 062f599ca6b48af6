"""New classes as weights on components that are there already: the nearest tailor's, and the learngenes'."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from conftest import NAMES
from kindiff import checkpoint
from kindiff.components import (
    Components,
    Tailor,
    decompose,
    load_components,
    load_tailor,
    save_components,
    swap_tailor_,
)
from kindiff.components.views import energies, tailor_cosines
from kindiff.config import TrainConfig, TransferConfig
from kindiff.errors import BadFileError, UsageError
from kindiff.evaluate.cost import cost_table, counted_macs, total
from kindiff.models import DiT
from kindiff.train.optimiser import Optimiser
from toys import assert_same_tensors

NEW = ("owl", "fox", "gnu")
NEAREST = {"owl": "dog", "fox": "ant", "gnu": "dog"}


@pytest.fixture
def model(kind_model: DiT) -> DiT:
    """Far from its start: every weight moved."""
    model = decompose(kind_model).with_new_tailors(NEW, rank=2, nearest=NEAREST, trains="gate")
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for _, layer in model.named_matrices():
            layer.tailor_gate += torch.randn(layer.tailor_gate.shape, generator=generator)
            layer.tailor_sigma += torch.randn(layer.tailor_sigma.shape, generator=generator)
    return model


@pytest.fixture
def parts(kind_model: DiT, model: DiT) -> Components:
    """The old classes, which weigh nothing, and the new ones."""
    return decompose(kind_model).extended(decompose(model))


@torch.no_grad()
def outputs(model: DiT, inputs: tuple[torch.Tensor, ...], ids: list[int], gates: list[int] | None = None):
    x, t, _ = inputs
    x = x[: len(ids)].to(model.class_embed.weight.dtype)
    return model(x, t[: len(ids)], torch.tensor(ids), None if gates is None else torch.tensor(gates))


def test_it_starts_as_the_nearest_class_and_only_weights_train(kind_model: DiT, inputs) -> None:
    started = decompose(kind_model).with_new_tailors(NEW, rank=3, nearest=NEAREST, trains="gate")
    dog, ant = NAMES.index("dog"), NAMES.index("ant")
    expected = outputs(kind_model, inputs, [dog, ant, dog, len(NAMES)])
    torch.testing.assert_close(outputs(started, inputs, [0, 1, 2, 3]), expected, rtol=0, atol=1e-5)
    trained = {name for name, p in started.named_parameters() if p.requires_grad}
    weights = {f"{name}.tailor_{leaf}" for name, _ in started.named_matrices() for leaf in ("sigma", "gate")}
    assert trained == weights | {"class_embed.weight"}
    count = sum(p.numel() for p in started.parameters() if p.requires_grad)
    assert count == 3 * 12 * (3 + 10) + 4 * 32, "classes x matrices x (N_T + N_G), and the embedding"


def test_a_part_of_the_nearest_tailor_is_its_largest_components(kind_model: DiT) -> None:
    parts = decompose(kind_model)
    some = parts.with_new_tailors(NEW, rank=2, nearest=NEAREST, trains="gate")
    for name, layer in some.named_matrices():
        old = parts.tailors["dog"]
        whole = (old[f"{name}.u"].T * old[f"{name}.sigma"]) @ old[f"{name}.v"]
        own = (layer.tailor_u[0].T * layer.tailor_sigma[0]) @ layer.tailor_v[0]
        left_out = torch.linalg.svdvals(whole)[2:].norm()
        torch.testing.assert_close(torch.linalg.norm(whole - own), left_out, rtol=1e-3, atol=1e-6)


def test_every_sample_sees_its_merged_matrices(model: DiT, inputs) -> None:
    """float64; new classes, the null class and a dropped gate."""
    model = model.double()
    ids, gates = [0, 1, 2, 3, 0, 1, 2], [0, 1, 2, 3, 0, 3, 2]
    found = outputs(model, inputs, ids, gates)
    x, t, _ = inputs
    for i, (class_id, gate_id) in enumerate(zip(ids, gates, strict=True)):
        merged = DiT(model.config, classes=model.classes).double()
        merged.load_state_dict(
            {k: v for k, v in model.state_dict().items() if k in merged.state_dict()}, strict=False
        )
        gating = model.gate(torch.tensor([gate_id]), model.class_embed.weight[[class_id]])
        for (name, source), (_, target) in zip(model.named_matrices(), merged.named_matrices(), strict=True):
            target.weight.data = source.merged_weight(gating)
            same = torch.allclose(target.weight, source.merged_weight())
            assert same == (gate_id == 3), f"{name}: without a gate the learngenes are as they were"
        alone = merged(x[i : i + 1].double(), t[i : i + 1], torch.tensor([class_id]))
        torch.testing.assert_close(found[i : i + 1], alone, rtol=0, atol=1e-10)


def test_parts_go_together_as_they_came_apart(kind_model: DiT, model: DiT, parts: Components, inputs) -> None:
    again = parts.recombine(NEW)
    assert again.structure == model.structure
    assert_same_tensors(again.state_dict(), model.state_dict())
    mixed = parts.recombine(["fox", "bee", "owl"])
    new, old = outputs(model, inputs, [1, 3, 0]), outputs(kind_model, inputs, [1, NAMES.index("bee"), 0])
    torch.testing.assert_close(
        outputs(mixed, inputs, [0, 1, 2]), torch.stack([new[0], old[1], new[2]]), rtol=0, atol=1e-5
    )
    assert not parts.recombine(["bee"]).structure["gated"], "old classes cost what they did"
    own = outputs(model, inputs, [2, 2])
    assert torch.equal(outputs(parts.recombine(["gnu"]), inputs, [0, 0]), own)
    merged = parts.recombine(["gnu"], layers="merged")
    assert merged.structure is None
    torch.testing.assert_close(outputs(merged, inputs, [0, 0]), own, rtol=0, atol=1e-5)


def test_what_needs_learngenes_as_they_are_is_refused(parts: Components) -> None:
    for wanted in ({"learngene_rank": 4}, {"layers": "dense"}):
        with pytest.raises(UsageError, match="weights of their own on each learngene"):
            parts.recombine(["owl", "bee"], **wanted)
        parts.recombine(["bee"], **wanted)
    with pytest.raises(UsageError, match="set init nearest"):
        TransferConfig(trains="gate")
    with pytest.raises(UsageError, match="set init nearest and share class"):
        TransferConfig(trains="gate", init="nearest", share="both")


def test_files_and_swaps(model: DiT, parts: Components, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "model")
    assert_same_tensors(DiT.from_pretrained(tmp_path / "model").state_dict(), model.state_dict())
    save_components(parts, tmp_path / "parts")
    again = load_components(tmp_path / "parts")
    for name in parts.classes:
        assert_same_tensors(again.tailors[name], parts.tailors[name])
    swapped = parts.recombine(["owl", "ant"])
    swap_tailor_(swapped, "owl", load_tailor(tmp_path / "parts", "fox"))
    assert_same_tensors(swapped.state_dict(), parts.recombine(["fox", "ant"]).state_dict())
    swap_tailor_(swapped, "fox", Tailor.of(parts, "bee"))
    assert not swapped.blocks[0].q.tailor_gate[0].any(), "nothing of the one before stays"
    with pytest.raises(UsageError, match="no tailor slot for"):
        swap_tailor_(parts.recombine(["eel"]), "eel", Tailor.of(parts, "fox"))

    path = tmp_path / "parts" / "tailors" / "owl.safetensors"
    tensors = dict(parts.tailors["owl"]) | {"blocks.0.q.gate": torch.zeros(9)}
    metadata = {
        "class": "owl",
        "learngenes": parts.learngene_hash,
        "sha256": checkpoint.hash_tensors(tensors),
    }
    checkpoint.write_tensors(path, tensors, metadata)
    with pytest.raises(BadFileError, match=r"owl\.safetensors.*blocks\.0\.q\.gate"):
        load_components(tmp_path / "parts")


def test_views_count_what_the_weights_add(model: DiT) -> None:
    model = model.double()
    cosines = tailor_cosines(model)
    tailors = []
    for name, layer in model.named_matrices():
        gatings = [model.gate(torch.tensor([i]), None) for i in range(3)]
        own = torch.stack([layer.merged_weight(gating) - layer.merged_weight() for gating in gatings])
        energy = float(own.square().sum(dim=(1, 2)).mean())
        assert energies(model)[name].tailors == pytest.approx(energy, rel=1e-10)
        tailors.append(own.flatten(1))
    expected = torch.nn.functional.normalize(torch.cat(tailors, dim=1), dim=1)
    torch.testing.assert_close(cosines, expected @ expected.T, rtol=0, atol=1e-10)


def test_costs_are_counted(model: DiT) -> None:
    assert total(cost_table(model)).macs == counted_macs(model)
    assert cost_table(model)["tailors"].trainable == 3 * 12 * (2 + 10)


def test_steps_move_the_weights_of_the_classes_they_see(model: DiT, inputs) -> None:
    """Apart from their banks as in them, in float64; frozen components, and classes not seen, to the bit."""
    x, t, _ = inputs
    apart, whole = (copy.deepcopy(model).double().train() for _ in range(2))
    optimisers = Optimiser(apart, TrainConfig(lr=1e-2)), Optimiser(whole, TrainConfig(lr=1e-2), alone=False)
    for ids in ([2, 0, 2, 3, 0, 2, 0], [0] * 7, [2] * 7):  # fox is never there
        ids_B = torch.tensor(ids)
        for own, optimiser in zip((apart, whole), optimisers, strict=True):
            slots = own.gate.slots_on(ids_B)
            with optimiser.of_slots(slots):
                own(x.double(), t, ids_B).square().mean().backward()
            optimiser.step(factor=1.0, slots=slots, ids=torch.unique(ids_B))
    before = model.double().state_dict()
    for (name, a), (_, b) in zip(apart.state_dict().items(), whole.state_dict().items(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, msg=name)
        if name.endswith(("tailor_sigma", "tailor_gate")):
            moved = (a != before[name]).any(dim=1).tolist()
            assert moved == [True, False, True], name
        elif name != "class_embed.weight":
            assert torch.equal(a, before[name]), name


@pytest.mark.slow
def test_one_graph_for_all_class_mixes(model: DiT, inputs) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x, t, _ = inputs
    generator = torch.Generator().manual_seed(5)
    for i in range(30):
        ids = torch.randint(0, 4, (7,), generator=generator)
        with torch.compiler.set_stance("fail_on_recompile" if i else "default"):
            compiled(x, t, ids).square().mean().backward()
    torch._dynamo.reset()
