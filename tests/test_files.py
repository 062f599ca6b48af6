"""Model and components directories: the same bits back, damage named, whole or not at all."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from conftest import NAMES, randomised
from kindiff import checkpoint
from kindiff.components import (
    Components,
    decompose,
    factorize,
    load_components,
    save_components,
)
from kindiff.config import AutoencoderConfig, DiTConfig, KindConfig
from kindiff.errors import BadFileError, UsageError
from kindiff.models import DiT
from kindiff.models.autoencoder import Autoencoder
from toys import assert_same_tensors, files_of, no_file_longer_than


@pytest.fixture
def model_folder(kind_model: DiT, tmp_path: Path) -> Path:
    kind_model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def parts(kind_model: DiT) -> Components:
    return decompose(kind_model)


@pytest.fixture
def parts_folder(parts: Components, tmp_path: Path) -> Path:
    save_components(parts, tmp_path / "parts")
    return tmp_path / "parts"


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def variants(dense: DiT) -> Iterator[DiT]:
    yield dense
    for gate in ("class", "soft"):
        for targets in (("q", "k", "v", "o", "mlp_in", "mlp_out"), ("v", "mlp_in")):
            kind = KindConfig(learngene_rank=10, tailor_rank=3, gate=gate, targets=targets)
            yield randomised(factorize(dense, kind), seed=1)
    small = decompose(randomised(factorize(dense, KindConfig(learngene_rank=10, tailor_rank=3)), seed=1))
    for layers in ("factored", "dense", "merged"):
        yield small.recombine(["eel"], layers=layers)
    yield small.recombine(["cat", "ant"], learngene_rank=4)
    yield small.with_new_tailors(["owl", "fox"], rank=2, share="task")


def test_every_kind_of_model_round_trips_to_the_bit(dense: DiT, tmp_path: Path) -> None:
    for i, model in enumerate(variants(dense)):
        model.save_pretrained(tmp_path / str(i))
        again = DiT.from_pretrained(tmp_path / str(i))
        assert (again.config, again.classes, again.structure) == (
            model.config,
            model.classes,
            model.structure,
        )
        assert_same_tensors(again.state_dict(), model.state_dict())
        assert torch.equal(again.positions_TD, model.positions_TD)
        again.save_pretrained(tmp_path / f"{i}-again")
        first = {k: content for k, (content, _) in files_of(tmp_path / str(i)).items()}
        assert {k: content for k, (content, _) in files_of(tmp_path / f"{i}-again").items()} == first


def test_components_round_trip_to_the_bit(parts: Components, parts_folder: Path) -> None:
    again = load_components(parts_folder)
    assert (again.config, again.targets, again.classes) == (parts.config, parts.targets, parts.classes)
    assert_same_tensors(again.learngenes, parts.learngenes)
    for name in NAMES:
        assert_same_tensors(again.tailors[name], parts.tailors[name])
    assert again.learngene_hash == parts.learngene_hash


def test_reading_one_class_opens_its_file_only(
    kind_model: DiT, parts: Components, parts_folder: Path
) -> None:
    for name in NAMES:
        if name != "dog":
            (parts_folder / "tailors" / f"{name}.safetensors").unlink()
    alone = load_components(parts_folder, ["dog"])
    assert alone.classes == ("dog",)
    assert_same_tensors(alone.tailors["dog"], parts.tailors["dog"])
    assert_same_tensors(alone.recombine().state_dict(), parts.recombine(["dog"]).state_dict())
    (parts_folder / "tailors" / "dog.safetensors").unlink()
    assert load_components(parts_folder, []).classes == ()
    with pytest.raises(FileNotFoundError, match=r"tailors/dog\.safetensors does not exist"):
        load_components(parts_folder, ["dog"])


def test_a_class_can_be_shipped_alone(parts: Components, parts_folder: Path, tmp_path: Path) -> None:
    """Its file put into another directory of the same learngenes works there (docs/formats.md)."""
    save_components(
        Components(
            parts.recombine(["ant"]).config, parts.targets, parts.learngenes, {"ant": parts.tailors["ant"]}
        ),
        tmp_path / "ant",
    )
    shutil.copy(parts_folder / "tailors" / "bee.safetensors", tmp_path / "ant" / "tailors")
    edit_json(tmp_path / "ant" / "config.json", classes=["ant", "bee"])
    both = load_components(tmp_path / "ant")
    assert_same_tensors(both.recombine().state_dict(), parts.recombine(["ant", "bee"]).state_dict())


# Damage


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def cut_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:40])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def extend(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0" * 8)


def foreign(path: Path) -> None:
    path.write_bytes(b"\x80\x04\x95 a pickle, say" * 20)


def claim_a_huge_header(path: Path) -> None:
    path.write_bytes((2**62).to_bytes(8, "little") + path.read_bytes()[8:])


def flip(path: Path, place: float = 0.7) -> None:
    content = bytearray(path.read_bytes())
    content[int(len(content) * place)] ^= 8
    path.write_bytes(content)


def flip_in_header(path: Path) -> None:
    flip(path, 30 / path.stat().st_size)


def flip_the_last(path: Path) -> None:
    flip(path, 1 - 1 / path.stat().st_size)


DAMAGE = pytest.mark.parametrize(
    "damage",
    [
        truncate, cut_header, empty, extend, foreign, claim_a_huge_header, flip, flip_in_header, flip_the_last,
    ],
)  # fmt: skip


@DAMAGE
def test_damaged_tensor_files_are_named(model_folder: Path, parts_folder: Path, damage) -> None:
    files: list[tuple[Path, Callable[[], object]]] = [
        (model_folder / "model.safetensors", lambda: DiT.from_pretrained(model_folder)),
        (parts_folder / "learngenes.safetensors", lambda: load_components(parts_folder)),
        (parts_folder / "tailors" / "cat.safetensors", lambda: load_components(parts_folder)),
    ]
    for path, read in files:
        whole = path.read_bytes()
        read()
        damage(path)
        with pytest.raises(BadFileError, match=str(path)) as caught:
            read()
        assert "\n" not in str(caught.value)
        path.write_bytes(whole)
        read()


def drop_key(path: Path, key: str) -> None:
    value = json.loads(path.read_text())
    del value[key]
    path.write_text(json.dumps(value))


@pytest.mark.parametrize(
    "damage",
    [
        empty,
        truncate,
        foreign,
        lambda path: path.write_text("[]"),
        lambda path: path.write_text('{"kind": "model", "kind": "components"}'),
        lambda path: path.write_text("[" * 100_000),
        lambda path: edit_json(path, format=2),
        lambda path: edit_json(path, kind="autoencoder"),
        lambda path: edit_json(path, classes=[]),
        lambda path: edit_json(path, classes=["ant", "ant", "cat", "dog", "eel"]),
        lambda path: edit_json(path, classes=["ant", "../../bee", "cat", "dog", "eel"]),
        lambda path: edit_json(path, classes=17),
        lambda path: edit_json(path, model={"width": 32}),
        lambda path: edit_json(path, model=None),
        lambda path: drop_key(path, "model"),
        lambda path: drop_key(path, "kind"),
    ],
)
def test_damaged_descriptions_are_named(model_folder: Path, parts_folder: Path, damage) -> None:
    for folder, read in ((model_folder, DiT.from_pretrained), (parts_folder, load_components)):
        damage(folder / "config.json")
        with pytest.raises(BadFileError, match=r"config\.json") as caught:
            read(folder)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"structure": {"rank": 10, "tailor_rank": 3}},
        {"structure": {"rank": -1, "tailor_rank": 3, "slots": 5}},
        {"structure": {"rank": 1000, "tailor_rank": 3, "slots": 5}},
        {"structure": 5},
        {"structure": {"rank": 10, "tailor_rank": 3, "slots": 5, "colour": "red"}},
    ],
)
def test_damaged_structures_are_named(model_folder: Path, changes) -> None:
    edit_json(model_folder / "config.json", **changes)
    with pytest.raises(BadFileError, match=r"config\.json"):
        DiT.from_pretrained(model_folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"learngene_rank": "ten"},
        {"learngene_rank": 0},
        {"targets": ["q", "w"]},
        {"targets": "qkv"},
        {"learngenes": None},
    ],
)
def test_damaged_component_descriptions_are_named(parts_folder: Path, changes) -> None:
    edit_json(parts_folder / "config.json", **changes)
    with pytest.raises(BadFileError, match=r"config\.json"):
        load_components(parts_folder)


def test_another_architecture_is_refused(model_folder: Path, parts_folder: Path, tmp_path: Path) -> None:
    for change in ({"width": 48, "heads": 3}, {"depth": 3}, {"patch": 4}, {"channels": 1}):
        config = {
            "input_size": 8,
            "channels": 3,
            "num_classes": 5,
            "width": 32,
            "depth": 2,
            "heads": 2,
            "patch": 2,
        }
        other = randomised(DiT(DiTConfig(**config | change)))
        kind = factorize(other, KindConfig(learngene_rank=10, tailor_rank=3))
        kind.save_pretrained(tmp_path / "other")
        shutil.copy(tmp_path / "other" / "model.safetensors", model_folder)
        with pytest.raises(BadFileError, match=r"model\.safetensors is of another architecture"):
            DiT.from_pretrained(model_folder)
        save_components(decompose(kind), tmp_path / "other-parts")
        shutil.copy(tmp_path / "other-parts" / "learngenes.safetensors", parts_folder)
        with pytest.raises(BadFileError, match=r"learngenes\.safetensors is of another architecture"):
            load_components(parts_folder)


def test_dense_weights_for_a_factored_description_are_refused(
    dense: DiT, model_folder: Path, tmp_path: Path
) -> None:
    dense.save_pretrained(tmp_path / "dense")
    shutil.copy(tmp_path / "dense" / "model.safetensors", model_folder)
    with pytest.raises(BadFileError, match="another architecture: it lacks"):
        DiT.from_pretrained(model_folder)


def test_a_tailor_of_other_learngenes_is_refused(
    dense: DiT, parts: Components, parts_folder: Path, tmp_path: Path
) -> None:
    other = randomised(factorize(dense, KindConfig(learngene_rank=10, tailor_rank=3)), seed=2)
    save_components(decompose(other), tmp_path / "other")
    shutil.copy(tmp_path / "other" / "tailors" / "cat.safetensors", parts_folder / "tailors")
    with pytest.raises(
        BadFileError, match=r"cat\.safetensors is the tailor of class 'cat' for other learngenes"
    ):
        load_components(parts_folder)
    assert load_components(parts_folder, ["ant", "dog"]).classes == ("ant", "dog"), "it is not opened"
    shutil.copy(parts_folder / "tailors" / "ant.safetensors", parts_folder / "tailors" / "cat.safetensors")
    with pytest.raises(BadFileError, match=r"cat\.safetensors is the tailor of class 'ant'"):
        load_components(parts_folder)


def test_learngenes_swapped_for_others_are_refused(dense: DiT, parts_folder: Path, tmp_path: Path) -> None:
    other = randomised(factorize(dense, KindConfig(learngene_rank=10, tailor_rank=3)), seed=2)
    save_components(decompose(other), tmp_path / "other")
    shutil.copy(tmp_path / "other" / "learngenes.safetensors", parts_folder)
    with pytest.raises(BadFileError, match=r"learngenes\.safetensors is damaged"):
        load_components(parts_folder)


def test_a_run_is_not_its_model(model_folder: Path) -> None:
    (model_folder.parent / "run.json").write_text("{}")
    for read in (DiT.from_pretrained, load_components):
        with pytest.raises(UsageError, match=rf"is a run; its model is {model_folder}\.$"):
            read(model_folder.parent)


def test_requests_that_the_directory_cannot_meet(
    parts_folder: Path, model_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"'catt' is unknown \(did you mean 'cat'\?\)"):
        load_components(parts_folder, ["catt"])
    with pytest.raises(UsageError, match="'cat' is asked for twice"):
        load_components(parts_folder, ["cat", "cat"])
    with pytest.raises(FileNotFoundError, match="no components directory"):
        load_components(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no model directory"):
        DiT.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(BadFileError, match="describes 'components'"):
        DiT.from_pretrained(parts_folder)
    with pytest.raises(BadFileError, match="describes 'model'"):
        load_components(model_folder)


def test_a_damaged_autoencoder_is_named(tmp_path: Path) -> None:
    torch.manual_seed(0)
    Autoencoder(AutoencoderConfig(width=8)).save_pretrained(tmp_path / "codec")
    whole = Autoencoder.from_pretrained(tmp_path / "codec")
    truncate(tmp_path / "codec" / "model.safetensors")
    with pytest.raises(BadFileError, match=r"model\.safetensors"):
        Autoencoder.from_pretrained(tmp_path / "codec")
    whole.save_pretrained(tmp_path / "codec")
    edit_json(tmp_path / "codec" / "config.json", model={"width": 9})
    with pytest.raises(BadFileError, match=r"config\.json is damaged"):
        Autoencoder.from_pretrained(tmp_path / "codec")


# Whole or not at all


def test_an_exception_in_the_middle_leaves_the_older_directory(model_folder: Path, tmp_path: Path) -> None:
    before = files_of(tmp_path)

    def fail_while_writing(target: Path, error: BaseException) -> None:
        with checkpoint.new_directory(target) as folder:
            checkpoint.write_json(folder / "config.json", {"kind": "model"})
            (folder / "half").write_bytes(b"half")
            raise error

    for error in (RuntimeError(), KeyboardInterrupt(), SystemExit()):
        for target in (model_folder, tmp_path / "new"):
            with pytest.raises(type(error)):
                fail_while_writing(target, error)
    assert files_of(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_failing_last_rename_puts_the_older_directory_back(
    dense: DiT, model_folder: Path, tmp_path: Path, monkeypatch
) -> None:
    before = files_of(tmp_path)
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name.endswith(".tmp"):
            raise OSError(errno.EIO, "the disk is gone")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="the disk is gone"), checkpoint.new_directory(model_folder) as folder:
        shutil.copytree(model_folder, folder, dirs_exist_ok=True)
    assert files_of(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_directory_is_replaced_by_one_of_its_sort(dense: DiT, model_folder: Path, tmp_path: Path) -> None:
    dense.save_pretrained(model_folder)
    assert DiT.from_pretrained(model_folder).structure is None
    (tmp_path / "empty").mkdir()
    dense.save_pretrained(tmp_path / "empty")
    assert DiT.from_pretrained(tmp_path / "empty").structure is None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "model"]


def test_nothing_else_is_replaced(
    kind_model: DiT, parts: Components, model_folder: Path, parts_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("precious")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "file").write_text("precious")
    before = files_of(tmp_path)
    for target in ("thesis", "foreign", "file", "parts"):
        with pytest.raises(UsageError, match="give another path or remove it"):
            kind_model.save_pretrained(tmp_path / target)
    with pytest.raises(UsageError, match="give another path or remove it"):
        save_components(parts, model_folder)
    assert files_of(tmp_path) == before
    assert not list(tmp_path.glob(".*"))


def test_of_foreign_files_only_what_diffusers_wrote_alike_is_replaced(tmp_path: Path) -> None:
    def write(name: str, files: dict[str, str]) -> None:
        with checkpoint.new_directory(tmp_path / name) as folder:
            for path, text in files.items():
                (folder / path).parent.mkdir(exist_ok=True)
                (folder / path).write_text(text)

    sorts = {
        "thesis": {"thesis.tex": "precious"},
        "bert": {"config.json": '{"model_type": "bert"}'},
        "vae": {"config.json": '{"_class_name": "AutoencoderKL"}'},
        "transformer": {"config.json": '{"_class_name": "DiTTransformer2DModel"}'},
        "pipeline": {"model_index.json": '{"_class_name": "DiTPipeline"}'},
        "pipelines": {"owl/model_index.json": '{"_class_name": "DiTPipeline"}'},
        "others": {"sd/model_index.json": '{"_class_name": "StableDiffusionPipeline"}'},
        "mixed": {
            "owl/model_index.json": '{"_class_name": "DiTPipeline"}',
            "thesis/thesis.tex": "precious",
        },
    }
    for name, files in sorts.items():
        write(name, files)
    before = files_of(tmp_path)
    for target in sorts:
        for sort, files in sorts.items():
            if target != sort or target in ("thesis", "bert", "mixed"):
                with pytest.raises(UsageError, match="give another path or remove it"):
                    write(target, files)
    assert files_of(tmp_path) == before
    for name in ("vae", "transformer", "pipeline", "pipelines"):
        write(name, sorts[name] | {"new.txt": ""} if name != "pipelines" else sorts[name])


@pytest.mark.parametrize("share", [0.02, 0.5, 0.99])
def test_a_full_disk_leaves_the_older_directory(
    kind_model: DiT, parts: Components, model_folder: Path, parts_folder: Path, tmp_path: Path, share
) -> None:
    before = files_of(tmp_path)
    for save, file in (
        (kind_model.save_pretrained, model_folder / "model.safetensors"),
        (lambda target: save_components(parts, target), parts_folder / "learngenes.safetensors"),
    ):
        limit = int(file.stat().st_size * share)
        for target in (file.parent, tmp_path / "new"):
            with no_file_longer_than(limit), pytest.raises(OSError, match=r"(?i)too large|no space"):
                save(target)
    assert files_of(tmp_path) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "parts"]


def test_a_truly_full_disk(parts: Components, tiny_disk: Path) -> None:
    small = parts.recombine(["ant"], learngene_rank=1)
    small.save_pretrained(tiny_disk / "model")
    before = files_of(tiny_disk)
    filler = tiny_disk / "filler"
    with pytest.raises(OSError, match="No space"):
        filler.write_bytes(b"x" * 2**20)
    with pytest.raises(OSError) as caught:  # noqa: PT011
        small.save_pretrained(tiny_disk / "model")
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(OSError, match="No space"):
        checkpoint.write_json(tiny_disk / "model" / "config.json", {"much": "x" * 10_000})
    filler.unlink()
    assert files_of(tiny_disk) == before
    assert [p.name for p in tiny_disk.iterdir()] == ["model"]


def test_a_failing_file_write_leaves_the_older_file(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    checkpoint.write_json(path, {"old": 1})
    with no_file_longer_than(100), pytest.raises(OSError, match=r"(?i)too large"):
        checkpoint.write_json(path, {"new": "x" * 1000})
    assert checkpoint.read_json(path) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["value.json"]
