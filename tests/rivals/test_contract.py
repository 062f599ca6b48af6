"""The contract matrix: one list of tests that every rival passes. A new rival is one entry of CASES.

C classes, D width, O/I features out/in.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from kindiff import checkpoint
from kindiff.config import MATRICES, DiTConfig, ObjectiveConfig, RivalConfig, TrainConfig
from kindiff.data import open_prepared
from kindiff.evaluate.cost import counted_macs
from kindiff.models import DiT
from kindiff.rivals import RIVALS, load_adapter, merged, save_adapter, start
from kindiff.train import fit
from kindiff.train.run import Run
from random_models import noisy_dit
from toys import NEW_SHAPES, SHAPES, assert_same_tensors, write_shapes

CONFIG = DiTConfig(input_size=8, channels=3, num_classes=len(SHAPES), width=32, depth=3, heads=2, patch=4)
ROWS = (len(NEW_SHAPES) + 1) * CONFIG.width
SEED = 3

Sides = Callable[[int, int], int]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A rival's settings and what it says of itself."""

    rival: RivalConfig
    trains: str
    """Names of what trains beside the class embedding, a pattern."""
    count: Sides | None = None
    """Numbers that train in a matrix (O, I); None: all of the network."""


def matrix(leaf: str) -> str:
    return rf"blocks\.\d\.(q|k|v|o|mlp_in|mlp_out)\.{leaf}"


def lora(method: str, **settings: object) -> Case:
    rival = RivalConfig(method=method, rank=4, **settings)
    return Case(rival=rival, trains=matrix(r"lora_[AB]\.default\.weight"), count=lambda o, i: 4 * (o + i))


def lokr_count(o: int, i: int) -> int:
    """LoKr of rank 2: a dense (a, c) factor and a (b, d) one of two thin sides; a b = O, c d = I, near the root."""
    (a, b), (c, d) = ({32: (4, 8), 128: (8, 16)}[side] for side in (o, i))
    return a * c + 2 * (b + d)


CASES = {
    "scratch": Case(rival=RivalConfig(method="scratch"), trains=".*"),
    "full": Case(rival=RivalConfig(method="full"), trains=".*"),
    "embedding": Case(
        rival=RivalConfig(method="embedding"), trains=r"class_embed\.weight", count=lambda o, i: 0
    ),
    "lora": lora("lora"),
    "lora-alpha": lora("lora", alpha=12.0),
    "pissa": lora("pissa"),
    "dora": Case(
        rival=RivalConfig(method="dora", rank=4),
        trains=matrix(r"lora_([AB]\.default|magnitude_vector\.default)\.weight"),
        count=lambda o, i: 4 * (o + i) + o,
    ),
    "oft": Case(
        rival=RivalConfig(method="oft", rank=8),
        trains=matrix(r"oft_R\.default\.weight"),
        count=lambda o, i: i * (8 - 1) // 2,
    ),
    "boft": Case(
        rival=RivalConfig(method="boft", rank=8),
        trains=matrix(r"boft_[Rs]\.default"),
        count=lambda o, i: i * 8 + o,
    ),
    "loha": Case(
        rival=RivalConfig(method="loha", rank=4),
        trains=matrix(r"hada_w[12]_[ab]\.default"),
        count=lambda o, i: 2 * 4 * (o + i),
    ),
    "lokr": Case(
        rival=RivalConfig(method="lokr", rank=2),
        trains=matrix(r"lokr_(w1|w2_[ab])\.default"),
        count=lokr_count,
    ),
    "vera": Case(
        rival=RivalConfig(method="vera", rank=16),
        trains=matrix(r"vera_lambda_[bd]\.default"),
        count=lambda o, i: 16 + o,
    ),
    "hra": Case(
        rival=RivalConfig(method="hra", rank=4), trains=matrix(r"hra_u\.default"), count=lambda o, i: 4 * i
    ),
    **{
        name: Case(rival=RivalConfig(method=name, **settings), trains=".*")
        for name, settings in {
            "heur-lg": {"inherit": 1},
            "auto-lg": {"blocks": (0, 2)},
            "tleg": {},
            "fine": {},
            "wave": {},
        }.items()
    },
    "svdiff": Case(rival=RivalConfig(method="svdiff"), trains=matrix("sigma"), count=lambda o, i: min(o, i)),
}
each_case = pytest.mark.parametrize("name", CASES)


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    return open_prepared(write_shapes(tmp_path_factory.mktemp("data") / "new", NEW_SHAPES, size=8))


@pytest.fixture(scope="module")
def base() -> DiT:
    return noisy_dit(CONFIG, SHAPES)


@dataclass(frozen=True)
class Trained:
    before: dict[str, torch.Tensor]
    """Tensors of the started model."""
    live: DiT
    """After its steps."""
    average: DiT
    """The EMA model."""


@pytest.fixture(scope="module")
def trained(base: DiT, samples, tmp_path_factory) -> Callable[[str], Trained]:
    """A case's model after real steps at a high rate, far from its start; made once."""
    made: dict[str, Trained] = {}

    def of(name: str) -> Trained:
        if name not in made:
            model = start(base, samples.classes, CASES[name].rival, seed=SEED)
            before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
            loop = TrainConfig(
                steps=20, batch=8, lr=0.03, warmup=1, decay=0.0, ema=0.5, precision="fp32", log_every=10
            )
            run = Run(tmp_path_factory.mktemp("runs") / name, {"case": name})
            average = fit(model, samples, ObjectiveConfig(gate_dropout=0.0), loop, run, True)
            made[name] = Trained(before, model, average)
        return made[name]

    return of


@torch.no_grad()
def outputs(model: DiT, ids: tuple[int, ...]) -> torch.Tensor:
    x = torch.randn(len(ids), 3, 8, 8, generator=torch.Generator().manual_seed(5))
    t = torch.linspace(10, 990, len(ids))
    return model.eval()(x, t, torch.tensor(ids))


ALL_IDS = (0, 1, 2, 0, 1, 2)  # the new classes and the null class


def test_every_rival_is_in_the_matrix() -> None:
    assert {case.rival.method for case in CASES.values()} == set(RIVALS)


@each_case
def test_the_base_does_not_change(name: str, base: DiT, samples) -> None:
    before = checkpoint.hash_tensors(base.state_dict())
    model = start(base, samples.classes, CASES[name].rival, seed=SEED)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1.0  # would show through any tensor that is shared
    assert checkpoint.hash_tensors(base.state_dict()) == before
    assert all(parameter.requires_grad for parameter in base.parameters())


@each_case
def test_the_right_things_train(name: str, base: DiT, samples) -> None:
    case = CASES[name]
    model = start(base, samples.classes, case.rival, seed=SEED)
    found = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    named = {key for key, _ in model.named_parameters() if re.fullmatch(case.trains, key)}
    assert named
    assert found == named | {"class_embed.weight"}
    if case.count is None:
        whole = sum(p.numel() for p in base.parameters())
        assert (
            sum(p.numel() for p in model.parameters() if p.requires_grad)
            == whole - (len(SHAPES) - len(NEW_SHAPES)) * CONFIG.width
        )
    else:
        matrices = sum(case.count(*CONFIG.matrix_shape(m)) for m in MATRICES)
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == CONFIG.depth * matrices + ROWS


@each_case
def test_the_start_is_a_function_of_its_arguments(name: str, base: DiT, samples) -> None:
    rival = CASES[name].rival
    first = start(base, samples.classes, rival, seed=SEED)
    torch.manual_seed(999)
    state = torch.random.get_rng_state()
    again = start(base, samples.classes, rival, seed=SEED)
    assert torch.equal(torch.random.get_rng_state(), state), "torch's own generator is left alone"
    assert_same_tensors(dict(again.state_dict()), dict(first.state_dict()))


@each_case
def test_the_forward_before_training_is_the_bases(name: str, base: DiT, samples) -> None:
    rival = CASES[name].rival
    keeps = RIVALS[rival.method].keeps
    model = start(base, samples.classes, rival, seed=SEED)
    null = outputs(base, (len(SHAPES),) * 3), outputs(model, (len(NEW_SHAPES),) * 3)
    if keeps is None:
        assert not torch.allclose(*null, rtol=1e-2, atol=1e-2), "it could promise its start"
        return
    torch.testing.assert_close(null[1], null[0], rtol=keeps, atol=keeps)
    rows, mean = model.class_embed.weight, base.class_embed.weight[:-1].mean(dim=0)
    assert all(torch.equal(row, mean) for row in rows[:-1])
    assert torch.equal(rows[-1], base.class_embed.weight[-1])


@each_case
def test_training_changes_what_trains_and_nothing_else(name: str, trained) -> None:
    result = trained(name)
    for key, parameter in result.live.named_parameters():
        assert torch.equal(parameter, result.before[key]) != parameter.requires_grad, key
    for key, buffer in result.live.named_buffers():
        assert key not in result.before or torch.equal(buffer, result.before[key]), key
    rows = result.live.class_embed.weight != result.before["class_embed.weight"]
    assert rows.any(dim=1).all(), "every new class's row and the null row train"
    for key, parameter in result.average.named_parameters():
        assert parameter.requires_grad == dict(result.live.named_parameters())[key].requires_grad
        assert torch.equal(parameter, result.before[key]) != parameter.requires_grad, key


@each_case
def test_merged_equals_unmerged(name: str, trained, base: DiT, samples) -> None:
    rival, model = CASES[name].rival, trained(name).average
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    dense = merged(model, rival)
    assert_same_tensors(dict(model.state_dict()), before)
    assert dense.structure is None
    assert dense.state_dict().keys() == base.state_dict().keys()
    assert all(parameter.requires_grad for parameter in dense.parameters())
    assert counted_macs(dense) == counted_macs(base)
    expected = outputs(model, ALL_IDS)
    torch.testing.assert_close(outputs(dense, ALL_IDS), expected, rtol=1e-5, atol=1e-5)
    untrained = merged(start(base, samples.classes, rival, seed=SEED), rival)
    assert (outputs(untrained, ALL_IDS) - expected).abs().max() > 0.05, "training moved it too little to tell"


@each_case
def test_an_adapter_saved_and_loaded_is_the_same(name: str, trained, base: DiT, tmp_path: Path) -> None:
    model = trained(name).average
    save_adapter(model, base, CASES[name].rival, tmp_path / "adapter", seed=SEED)
    names = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert checkpoint.read_tensors(tmp_path / "adapter" / "adapter.safetensors").keys() == names
    again = load_adapter(base, tmp_path / "adapter")
    assert again.classes == model.classes
    assert torch.equal(outputs(again, ALL_IDS), outputs(model, ALL_IDS))


@each_case
def test_it_trains_in_bf16(name: str, base: DiT, samples, tmp_path: Path) -> None:
    model = start(base, samples.classes, CASES[name].rival, seed=SEED)
    loop = TrainConfig(steps=2, batch=4, warmup=1, precision="bf16")
    average = fit(model, samples, ObjectiveConfig(gate_dropout=0.0), loop, Run(tmp_path / "run", {}), True)
    assert {p.dtype for p in average.parameters()} == {torch.float32}
    assert outputs(average, ALL_IDS).isfinite().all()
