"""`adapt`: runs that resume to the bit, what they write, and requests that cannot be met."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from kindiff import checkpoint
from kindiff.cli.main import main
from kindiff.components import load_components
from kindiff.config import AdaptConfig, DataConfig, RivalConfig, TrainConfig, from_dict, to_dict
from kindiff.data import open_prepared
from kindiff.errors import BadFileError, UsageError
from kindiff.models import DiT
from kindiff.rivals import load_adapter, merged
from kindiff.train import Interrupted, adapt, pretrain
from kindiff.train import loop as train_loop
from toys import NEW_SHAPES, SIZE, assert_same_tensors, files_of, toy, toy_arguments, write_shapes

LOOP = TrainConfig(steps=8, batch=6, lr=0.02, warmup=1, save_every=3, log_every=3)


@pytest.fixture(scope="module")
def toys(tmp_path_factory) -> Path:
    """shapes, new-shapes: sets; dense, kind: pre-trained runs; parts: of kind. Read only."""
    place = tmp_path_factory.mktemp("toys")
    write_shapes(place / "shapes")
    write_shapes(place / "new-shapes", NEW_SHAPES)
    pretrain(toy(place / "shapes", method="dense"), place / "dense")
    assert main(["pretrain", str(place / "kind"), *toy_arguments(place / "shapes")]) == 0
    assert main(["decompose", str(place / "kind" / "model"), str(place / "parts")]) == 0
    return place


def asked(toys: Path, rival: RivalConfig, **train: object) -> AdaptConfig:
    return AdaptConfig(
        data=DataConfig(source=str(toys / "new-shapes"), size=SIZE),
        rival=rival,
        train=dataclasses.replace(LOOP, **train),
    )


@pytest.mark.parametrize("method", ["lora", "svdiff"])
def test_stopped_and_resumed_equals_uninterrupted(
    toys: Path, tmp_path: Path, monkeypatch, method: str
) -> None:
    config, base = asked(toys, RivalConfig(method=method)), toys / "dense" / "model"
    whole = adapt(base, config, tmp_path / "whole")

    def stop_after_five(model, *arguments, **options):
        calls.append(1)
        if len(calls) == 5:
            raise Interrupted(2, "stopped by the test")
        return write(model, *arguments, **options)

    calls: list[int] = []
    write = train_loop.factor_of
    with monkeypatch.context() as patch:
        patch.setattr(train_loop, "factor_of", stop_after_five)
        with pytest.raises(Interrupted):
            adapt(base, config, tmp_path / "parted")
    assert not (tmp_path / "parted" / "model").exists()
    resumed = adapt(base, config, tmp_path / "parted")
    assert_same_tensors(dict(resumed.model.state_dict()), dict(whole.model.state_dict()))
    files = [files_of(tmp_path / run / "adapter") for run in ("parted", "whole")]
    assert {k: v[0] for k, v in files[0].items()} == {k: v[0] for k, v in files[1].items()}


def test_the_run_holds_the_merged_model_and_the_adapter(toys: Path, tmp_path: Path, capsys) -> None:
    base, out = toys / "dense" / "model", tmp_path / "run"
    arguments = [
        "adapt", str(base), str(out), "--rival.method", "lora", "--rival.rank", "4",
        "--data.source", str(toys / "new-shapes"), "--data.size", str(SIZE), "--train.steps", "6",
        "--train.batch", "6", "--train.lr", "0.02", "--train.warmup", "1",
    ]  # fmt: skip
    assert main(arguments) == 0
    assert capsys.readouterr().out == f"{out / 'model'}\n"
    model = DiT.from_pretrained(out / "model")
    assert model.structure is None
    assert model.classes.names == NEW_SHAPES
    again = merged(load_adapter(DiT.from_pretrained(base), out / "adapter"), RivalConfig(rank=4))
    assert_same_tensors(dict(again.state_dict()), dict(model.state_dict()))
    before = files_of(out)
    assert main(arguments) == 0
    assert "is finished already" in capsys.readouterr().err
    assert files_of(out) == before
    assert main([*arguments, "--rival.rank", "2"]) == 2
    assert "rival.rank was 4, now 2" in capsys.readouterr().err


def test_samples_that_are_open_already(toys: Path, tmp_path: Path) -> None:
    config, base = asked(toys, RivalConfig(method="full")), toys / "dense" / "model"
    elsewhere = dataclasses.replace(config, data=DataConfig(source=str(tmp_path / "nothing"), size=SIZE))
    given = adapt(base, elsewhere, tmp_path / "given", samples=open_prepared(toys / "new-shapes"))
    opened = adapt(base, config, tmp_path / "opened")
    assert_same_tensors(dict(given.model.state_dict()), dict(opened.model.state_dict()))


def test_the_null_class_is_trained(toys: Path, tmp_path: Path) -> None:
    base = DiT.from_pretrained(toys / "dense" / "model")
    out = adapt(toys / "dense" / "model", asked(toys, RivalConfig(), steps=20), tmp_path / "run")
    row, before = out.model.class_embed.weight[-1], base.class_embed.weight[-1]
    assert not torch.equal(row, before)


def test_what_cannot_be_is_said_and_leaves_nothing(toys: Path, tmp_path: Path) -> None:
    config = asked(toys, RivalConfig())
    with pytest.raises(UsageError, match="made of components; rivals start from a dense model"):
        adapt(toys / "kind" / "model", config, tmp_path / "run")
    write_shapes(tmp_path / "large", NEW_SHAPES, size=32)
    large = dataclasses.replace(config, data=DataConfig(source=str(tmp_path / "large"), size=32))
    with pytest.raises(UsageError, match="the images are 32 x 32"):
        adapt(toys / "dense" / "model", large, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_adapter_is_for_its_base(toys: Path, tmp_path: Path) -> None:
    adapt(toys / "dense" / "model", asked(toys, RivalConfig(rank=2)), tmp_path / "run")
    other = load_components(toys / "parts").recombine(["disc"], layers="merged")
    with pytest.raises(UsageError, match="trained on another base"):
        load_adapter(other, tmp_path / "run" / "adapter")
    base = DiT.from_pretrained(toys / "dense" / "model")
    with pytest.raises(FileNotFoundError, match="no adapter directory"):
        load_adapter(base, tmp_path)
    with pytest.raises(BadFileError, match="an adapter of format"):
        load_adapter(base, toys / "dense" / "model")
    path = tmp_path / "run" / "adapter" / "config.json"
    description = checkpoint.read_json(path)
    checkpoint.write_json(path, description | {"rival": {"method": "lore"}})
    with pytest.raises(BadFileError, match=r"is damaged: method is .lore"):
        load_adapter(base, tmp_path / "run" / "adapter")
    checkpoint.write_json(path, description | {"rival": description["rival"] | {"rank": 4}})
    with pytest.raises(BadFileError, match="of another architecture"):
        load_adapter(base, tmp_path / "run" / "adapter")
    checkpoint.write_json(path, description | {"weights": "0" * 64})
    with pytest.raises(BadFileError, match="its hash is not the recorded one"):
        load_adapter(base, tmp_path / "run" / "adapter")


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ({"method": "full", "rank": 4}, "rank is 4 and full has no such setting"),
        ({"method": "oft", "alpha": 2.0}, "alpha is 2.0 and oft has no such setting"),
        ({"method": "lora", "inherit": 1}, "inherit is 1 and lora has no such setting"),
        ({"method": "heur-lg", "blocks": [0]}, "blocks is .0,. and heur-lg has no such setting"),
        ({"method": "lora", "rank": 0}, "rank is 0; it must be at least 1"),
        ({"method": "lora", "alpha": -1.0}, "alpha is -1.0; it must be 0 or more"),
        ({"method": "hra", "rank": 3}, "an even number of reflections"),
        ({"method": "auto-lg", "blocks": [1, 1]}, "name each block once"),
        ({"method": "fine", "sigma_share": 1.0}, "from 0 to below 1"),
        ({"method": "heur-lg", "inherit": 0}, "inherit is 0; it must be at least 1"),
        ({"method": "lorra"}, "did you mean 'lora'"),
    ],
)
def test_settings_that_are_not_used_or_cannot_be(values: dict[str, object], fault: str) -> None:
    with pytest.raises(UsageError, match=fault):
        from_dict(RivalConfig, values)


def test_a_config_survives_json() -> None:
    config = AdaptConfig(rival=RivalConfig(method="auto-lg", blocks=(0, 2)))
    assert from_dict(AdaptConfig, to_dict(config)) == config
