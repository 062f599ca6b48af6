"""What cannot be done: one sentence on stderr, the right exit code, nothing half-written."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from kindiff.classes import ClassSet
from kindiff.cli.main import main
from kindiff.config import DiTConfig
from kindiff.models import DiT
from toys import (
    NEW_SHAPES,
    SIZE,
    files_of,
    kindiff_script,
    no_file_longer_than,
    one_thread,
    toy_arguments,
    write_image_folder,
    write_shapes,
)

USAGE, FAILURE = 2, 1


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("toys")
    write_shapes(place / "shapes")
    write_shapes(place / "new-shapes", NEW_SHAPES)
    assert main(["pretrain", str(place / "run"), *toy_arguments(place / "shapes")]) == 0
    assert main(["decompose", str(place / "run" / "model"), str(place / "parts")]) == 0
    shutil.rmtree(place / "run" / "checkpoints")
    return place


@pytest.fixture
def place(originals: Path, tmp_path: Path, monkeypatch) -> Path:
    """A copy to damage: shapes, new-shapes, run, parts. The cache is a folder of the test's own."""
    monkeypatch.setenv("KINDIFF_CACHE", str(tmp_path / "cache"))
    for name in ("run", "parts"):
        shutil.copytree(originals / name, tmp_path / "toys" / name)
    for name in ("shapes", "new-shapes"):
        (tmp_path / "toys" / name).symlink_to(originals / name)
    return tmp_path / "toys"


def refuse(capfd, place: Path, code: int, *arguments: object) -> str:
    """Run a command that must fail with this code; returns its one sentence."""
    before = files_of(place)
    capfd.readouterr()
    assert main([str(a) for a in arguments]) == code
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1, captured.err
    assert captured.err.startswith("kindiff: ")
    assert captured.err.rstrip()[-1] in ".?", captured.err
    assert files_of(place) == before, "something was written"
    assert not list(place.rglob(".*")), "a temporary is left behind"
    return captured.err.removeprefix("kindiff: ").rstrip()


def transfer(place: Path, *options: object) -> list[object]:
    return [
        "transfer", place / "parts", place / "new", "--data.source", place / "new-shapes", "--data.size", SIZE,
        *options,
    ]  # fmt: skip


# Usage: exit code 2


def test_unknown_class(place: Path, capfd) -> None:
    sentence = refuse(capfd, place, USAGE, "recombine", place / "parts", place / "x", "--classes", "discs")
    assert "class 'discs' is unknown (did you mean 'disc'?)" in sentence
    sentence = refuse(capfd, place, USAGE, "sample", place / "run/model", place / "x", "--classes", "owl")
    assert "class 'owl' is unknown; this model has 4 classes: disc, bars, chess, ramp." in sentence
    refuse(
        capfd,
        place,
        USAGE,
        "pretrain",
        place / "x",
        *toy_arguments(place / "shapes"),
        "--data.classes",
        "owl",
    )


def test_a_class_asked_twice(place: Path, capfd) -> None:
    for command in (["recombine", place / "parts"], ["sample", place / "run" / "model"]):
        sentence = refuse(capfd, place, USAGE, *command, place / "x", "--classes", "disc", "bars", "disc")
        assert sentence == "class 'disc' is asked for twice; name each class once."


def test_a_tailor_rank_larger_than_the_matrixs(place: Path, capfd) -> None:
    sentence = refuse(capfd, place, USAGE, *transfer(place, "--rank", 33))
    assert sentence == "tailor rank 33 is larger than the full rank 32 of matrix 'q'; use 1 to 32."
    arguments = [*toy_arguments(place / "shapes"), "--kind.tailor-rank", 33]
    sentence = refuse(capfd, place, USAGE, "pretrain", place / "x", *arguments)
    assert "tailor rank 33 is larger than the full rank 32 of matrix 'q'" in sentence


def test_a_learngene_rank_larger_than_the_matrixs(place: Path, capfd) -> None:
    arguments = [*toy_arguments(place / "shapes"), "--kind.learngene-rank", 33]
    sentence = refuse(capfd, place, USAGE, "pretrain", place / "x", *arguments)
    assert "learngene rank 33 is larger than the full rank 32 of matrix 'q'; use 1 to 32." in sentence


@pytest.mark.parametrize("rank", [9, 0, -2])
def test_a_learngene_rank_that_the_parts_do_not_hold(place: Path, capfd, rank) -> None:
    sentence = refuse(
        capfd, place, USAGE, "recombine", place / "parts", place / "x", "--learngene-rank", rank
    )
    assert sentence == f"learngene rank {rank} is not in the parts; they hold 8 components, so use 1 to 8."


def test_an_image_folder_with_one_empty_class(place: Path, capfd) -> None:
    write_image_folder(place / "images", ("disc", "bars"))
    (place / "images" / "void").mkdir()
    arguments = [*toy_arguments(place / "images")]
    sentence = refuse(capfd, place, USAGE, "pretrain", place / "x", *arguments)
    assert sentence == (
        f"class folder {place / 'images' / 'void'} has no images; add some or remove the folder."
    )


def test_image_folders_of_the_wrong_layout(place: Path, capfd) -> None:
    sentence = refuse(capfd, place, FAILURE, "pretrain", place / "x", "--data.source", place / "nowhere")
    assert "does not exist; give a folder with one sub-folder a class." in sentence
    (place / "flat").mkdir()
    sentence = refuse(capfd, place, USAGE, "pretrain", place / "x", "--data.source", place / "flat")
    assert "has no sub-folders" in sentence
    sentence = refuse(capfd, place, USAGE, "pretrain", place / "x", "--data.source", "avatars:bse")
    assert "did you mean" in sentence


def test_images_of_another_size_than_the_parts(place: Path, capfd) -> None:
    write_shapes(place / "large", NEW_SHAPES, size=32)
    arguments = ["--data.source", place / "large", "--data.size", 32]
    sentence = refuse(capfd, place, USAGE, "transfer", place / "parts", place / "new", *arguments)
    assert "the images are 32 x 32 with 3 channels, the parts were trained on 16 x 16 with 3" in sentence


def test_a_recipe_with_a_misspelt_key(place: Path, capfd) -> None:
    recipe = place / "recipe.toml"
    for text, words in (
        ("[train]\nstpes = 3\n", "unknown key 'train.stpes' (did you mean 'steps'?)"),
        ("[trian]\nsteps = 3\n", "unknown key 'trian' (did you mean 'train'?)"),
        ('[train]\nsteps = "many"\n', "train.steps is 'many'; it must be of type int."),
        ("[train]\nsteps = true\n", "train.steps is True; it must be of type int."),
        ('[kind]\nlearngene_rank = 8\ntailor_rank = 2\ninit = "svdd"\n', "did you mean 'svd'?"),
        ("[kind]\ntailor_rank = 2\n", "kind lacks the required key 'learngene_rank'."),
        ("[train\n", "is not valid TOML"),
        ("[train]\nsteps = 0\n", "steps is 0; it must be at least 1."),
    ):
        recipe.write_text(text)
        sentence = refuse(capfd, place, USAGE, "pretrain", place / "x", "--config", recipe)
        assert sentence.startswith(f"recipe {recipe}")
        assert words in sentence


def test_a_recipe_of_another_command(place: Path, capfd) -> None:
    recipe = Path(__file__).parents[2] / "recipes" / "avatars.toml"
    sentence = refuse(capfd, place, USAGE, *transfer(place, "--config", recipe))
    assert "unknown key 'method'" in sentence
    sentence = refuse(capfd, place, USAGE, "env", "--config", recipe)
    assert sentence == "kindiff env takes no --config."


def test_an_unknown_command(capfd, tmp_path: Path) -> None:
    sentence = refuse(capfd, tmp_path, USAGE, "recombin", "x")
    assert sentence == "unknown command 'recombin' (did you mean 'recombine'?); `kindiff --help` lists them."


def test_a_sampler_that_does_not_fit(place: Path, capfd) -> None:
    arguments = ["sample", place / "run" / "model", place / "x.png", "--sampler", "ddpm"]
    assert "use euler or heun" in refuse(capfd, place, USAGE, *arguments)


def test_a_request_for_no_image(place: Path, capfd) -> None:
    arguments = ["sample", place / "run" / "model", place / "x.png", "--per-class", "0"]
    assert "per_class is 0" in refuse(capfd, place, USAGE, *arguments)


def test_a_dense_model_cannot_be_decomposed(place: Path, capfd) -> None:
    main(
        [
            str(a)
            for a in ("recombine", place / "parts", place / "one", "--classes", "disc", "--layers", "merged")
        ]
    )
    sentence = refuse(capfd, place, USAGE, "decompose", place / "one", place / "x")
    assert "dense matrices" in sentence


def test_several_classes_cannot_be_merged(place: Path, capfd) -> None:
    arguments = ["recombine", place / "parts", place / "x", "--layers", "merged"]
    assert "merged layers hold one class and 4 are asked for" in refuse(capfd, place, USAGE, *arguments)


def test_a_device_that_is_not_there(place: Path, capfd) -> None:
    arguments = ["sample", place / "run" / "model", place / "x.png", "--device", "quantum"]
    assert "device 'quantum' is unknown" in refuse(capfd, place, USAGE, *arguments)
    assert "not one that kindiff runs on" in refuse(capfd, place, USAGE, *arguments[:-1], "meta")


def test_a_latent_model_without_its_autoencoder_draws_no_pictures(place: Path, capfd) -> None:
    config = DiTConfig(input_size=8, channels=4, num_classes=1, width=32, depth=1, heads=2, patch=4)
    DiT(config, classes=ClassSet(("a",))).save_pretrained(place / "latent")
    capfd.readouterr()
    for command in (["sample", place / "latent", place / "x.png"], ["evaluate", place / "latent"]):
        assert "latents of 4 channels" in refuse(capfd, place, USAGE, *command)


def test_names_that_are_no_text(place: Path, capfd) -> None:
    (place / "names.txt").write_bytes(b"\xff\xfe")
    (place / "dit.pt").write_bytes(b"")
    options = ["--from", "released", "--to", "kindiff", "--names", place / "names.txt"]
    sentence = refuse(capfd, place, FAILURE, "convert", place / "dit.pt", place / "x", *options)
    assert sentence == f"names {place / 'names.txt'} is not text in UTF-8."


def test_a_transfer_that_cannot_start_is_refused_by_its_plan_too(place: Path, capfd) -> None:
    recipe = place / "kind.toml"
    recipe.write_text(
        '[data]\nsource = "gone"\nclasses = ["a", "b"]\n[kind]\nlearngene_rank = 8\ntailor_rank = 2\n'
    )
    for options, words in (
        (["--rank", 0], "rank is 0"),
        (["--share", "task", "--init", "nearest"], "a tailor for each class"),
        (["--trains", "mixture", "--init", "nearest", "--mixes", 3], "the parts hold 2"),
    ):
        command = ["transfer", recipe, place / "x", "--data.source", "gone", *options, "--dry-run"]
        assert words in refuse(capfd, place, USAGE, *command)


def test_an_output_that_holds_other_things(place: Path, capfd) -> None:
    (place / "thesis").mkdir()
    (place / "thesis" / "thesis.tex").write_text("precious")
    (place / "note.txt").write_text("precious")
    model, parts = place / "run" / "model", place / "parts"
    for out in ("thesis", "parts", "run", "note.txt"):
        for command in (["decompose", model], ["sample", model], ["recombine", parts]):
            if (command[0], out) == ("decompose", "parts"):
                continue  # an older directory of the same sort
            sentence = refuse(capfd, place, USAGE, *command, place / out)
            assert "give another path or remove it." in sentence


@pytest.mark.parametrize(
    "options",
    [
        ["--train.steps", "0"], ["--train.steps", "x"], ["--train.stepz", "1"], ["--kind.init", "svdd"],
        ["--train.lr", "nan"], ["--objective.label-dropout", "1.5"], ["--data.size"],
    ],
)  # fmt: skip
def test_options_that_cannot_be_are_explained(place: Path, capfd, options) -> None:
    """tyro's own box: the option, what is allowed, where the help is; exit code 2."""
    before = files_of(place)
    with pytest.raises(SystemExit) as stopped:
        main(["pretrain", str(place / "x"), *options])
    assert stopped.value.code == USAGE
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    assert options[0].lstrip("-").rsplit(".", 1)[-1].replace("-", "_") in captured.err.replace("-", "_")
    assert files_of(place) == before


# Failures: exit code 1


def test_a_checkpoint_of_another_architecture(place: Path, capfd) -> None:
    other = [*toy_arguments(place / "shapes", steps=1), "--model.depth", "1"]
    assert main(["pretrain", str(place / "other"), *other]) == 0
    shutil.copy(place / "other" / "model" / "model.safetensors", place / "run" / "model")
    for command in (
        ["sample", place / "run/model", place / "x"],
        ["decompose", place / "run/model", place / "x"],
    ):
        sentence = refuse(capfd, place, FAILURE, *command)
        assert f"{place / 'run/model/model.safetensors'} is of another architecture: it lacks" in sentence


def test_a_truncated_file(place: Path, capfd) -> None:
    for path, command in (
        (place / "run/model/model.safetensors", ["sample", place / "run/model", place / "x"]),
        (place / "parts/learngenes.safetensors", ["recombine", place / "parts", place / "x"]),
        (place / "parts/tailors/bars.safetensors", ["inspect", place / "parts"]),
        (place / "run/model/config.json", ["inspect", place / "run/model"]),
    ):
        whole = path.read_bytes()
        path.write_bytes(whole[:-9])
        assert str(path) in refuse(capfd, place, FAILURE, *command)
        path.write_bytes(whole)


def test_a_missing_recipe_and_a_missing_model(place: Path, capfd) -> None:
    sentence = refuse(capfd, place, FAILURE, "pretrain", place / "x", "--config", place / "no.toml")
    assert sentence == f"recipe {place / 'no.toml'} does not exist."
    for command in (["sample", place / "no", place / "x"], ["decompose", place / "no", place / "x"]):
        assert f"{place / 'no'} is no model directory" in refuse(capfd, place, FAILURE, *command)
    sentence = refuse(capfd, place, FAILURE, "recombine", place / "no", place / "x")
    assert "is no components directory" in sentence
    assert "neither a model nor" in refuse(capfd, place, FAILURE, "inspect", place / "no")
    assert f"{place}: Is a directory." in refuse(
        capfd, place, FAILURE, "pretrain", place / "x", "--config", place
    )


def test_a_full_disk_while_saving(place: Path, capfd) -> None:
    """The third save fails for want of space; the second checkpoint is there and the run goes on from it."""
    arguments = ["pretrain", str(place / "full"), *toy_arguments(place / "shapes", steps=9, save_every=3)]
    assert main(arguments) == 0
    wanted = {k: v for k, (v, _) in files_of(place / "full" / "model").items()}
    checkpoint = place / "full" / "checkpoints" / "step-00000009"
    limit = (checkpoint / "optimiser.safetensors").stat().st_size - 1
    shutil.rmtree(place / "full")

    with no_file_longer_than(limit):
        assert main(arguments) == FAILURE
    stderr = capfd.readouterr().err
    assert "Traceback" not in stderr
    assert "too large" in stderr.splitlines()[-1]
    assert not list((place / "full").rglob(".*"))
    assert not (place / "full" / "model").exists()
    assert main(arguments) == 0
    assert {k: v for k, (v, _) in files_of(place / "full" / "model").items()} == wanted


def test_a_truly_full_disk_in_its_own_words(place: Path, tiny_disk: Path, capfd) -> None:
    assert main(["recombine", str(place / "parts"), str(tiny_disk / "model"), "--classes", "disc"]) == 0
    before = files_of(tiny_disk)
    (tiny_disk / "filler").write_bytes(b"x" * (430_000 - sum(len(c) for c, _ in before.values())))
    sentence = refuse(capfd, tiny_disk, FAILURE, "recombine", place / "parts", tiny_disk / "model")
    assert sentence.startswith("the disk is full; nothing half-written was left and earlier files are whole.")
    (tiny_disk / "filler").unlink()
    assert files_of(tiny_disk) == before


def test_a_folder_that_cannot_be_written(place: Path, capfd) -> None:
    (place / "file").write_text("")
    sentence = refuse(capfd, place, FAILURE, "recombine", place / "parts", place / "file" / "model")
    assert str(place / "file") in sentence


def test_the_process_itself(place: Path) -> None:
    """Once through the installed script: the same sentence and code, no traceback."""
    arguments = [kindiff_script(), "recombine", place / "parts", place / "x", "--classes", "owl"]
    done = subprocess.run(arguments, env=one_thread(), capture_output=True, text=True, check=False)
    assert done.returncode == USAGE
    assert done.stderr.startswith("kindiff: class 'owl' is unknown")
    assert done.stderr.count("\n") == 1
    assert json.loads((place / "parts" / "config.json").read_text())["kind"] == "components"
