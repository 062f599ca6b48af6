"""Every command end to end on a toy."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kindiff.cli.main import COMMANDS, main
from kindiff.components import load_components
from kindiff.models import DiT
from toys import NEW_SHAPES, SHAPES, SIZE, files_of, kindiff_script, one_thread, toy_arguments, write_shapes

LOOP = [
    "--train.steps", "4", "--train.batch", "6", "--train.lr", "0.01", "--train.save-every", "2",
    "--train.log-every", "2",
]  # fmt: skip


@pytest.fixture(scope="module")
def toys(tmp_path_factory) -> Path:
    """shapes, new-shapes: sets; run: a pre-trained model; parts: taken apart. Read only."""
    place = tmp_path_factory.mktemp("toys")
    write_shapes(place / "shapes")
    write_shapes(place / "new-shapes", NEW_SHAPES)
    assert main(["pretrain", str(place / "run"), *toy_arguments(place / "shapes")]) == 0
    assert main(["decompose", str(place / "run" / "model"), str(place / "parts")]) == 0
    return place


def succeed(capfd, *arguments: object) -> str:
    """Run a command in this process; returns what it wrote to stdout."""
    capfd.readouterr()
    code = main([str(a) for a in arguments])
    captured = capfd.readouterr()
    assert code == 0, captured.err
    return captured.out


# Help


def test_help_is_quick() -> None:
    seconds = []
    for _ in range(3):
        started = time.monotonic()
        done = subprocess.run([kindiff_script(), "--help"], capture_output=True, text=True, check=True)
        seconds.append(time.monotonic() - started)
    assert min(seconds) < 0.5
    assert all(f"  {name} " in done.stdout for name in COMMANDS)
    assert done.stderr == ""


def test_no_help_imports_torch() -> None:
    program = """
import sys
from kindiff.cli.main import COMMANDS, main
assert main(["--help"]) == 0
for name in COMMANDS:
    try:
        main([name, "--help"])
    except SystemExit as stop:
        assert stop.code == 0, name
    else:
        raise AssertionError(f"no help of {name}")
    heavy = {"torch", "numpy", "scipy", "PIL", "matplotlib"} & set(sys.modules)
    assert not heavy, (name, heavy)
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for name in COMMANDS:
        assert f"usage: kindiff {name} " in done.stdout


def test_every_command_says_what_it_does_in_the_list() -> None:
    assert main([]) == 2
    files = {p.stem for p in Path(sys.modules["kindiff.cli.main"].__file__).parent.glob("*.py")}
    assert set(COMMANDS) == files - {"__init__", "main"}


def test_a_full_device_is_one_sentence(monkeypatch, tmp_path: Path, capfd) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("kindiff.train.pretrain", full)
    assert main(["pretrain", str(tmp_path / "run")]) == 1
    err = capfd.readouterr().err
    assert "the device's memory is full" in err
    assert err.count("\n") == 1


def test_version(capsys) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("kindiff 0.")


# The verbs


def test_pretrain_writes_a_run(toys: Path, capfd) -> None:
    assert (
        succeed(capfd, "pretrain", toys / "run", *toy_arguments(toys / "shapes"))
        == f"{toys / 'run' / 'model'}\n"
    )
    assert DiT.from_pretrained(toys / "run" / "model").classes.names == SHAPES
    described = json.loads((toys / "run" / "run.json").read_text())
    assert described["description"]["config"]["train"]["steps"] == 12
    assert {"versions", "hardware"} <= described.keys()
    lines = [json.loads(line) for line in (toys / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["images"] for line in lines] == [24, 48, 72, 96]


def test_a_dry_run_trains_nothing(toys: Path, tmp_path: Path, capfd) -> None:
    out = succeed(capfd, "pretrain", tmp_path / "run", "--dry-run", *toy_arguments(toys / "shapes"))
    assert "24 samples of 4 classes, 16 x 16" in out
    assert "12 steps of 8: 96 images, 4.0 epochs" in out
    assert not (tmp_path / "run").exists()


def test_a_recipe_and_its_overrides(toys: Path, tmp_path: Path, capfd) -> None:
    recipe = tmp_path / "toy.toml"
    recipe.write_text(
        f'[data]\nsource = "{toys / "shapes"}"\nsize = {SIZE}\n[model]\nwidth = 32\ndepth = 1\nheads = 2\n'
        '[kind]\nlearngene_rank = 8\ntailor_rank = 1\ntargets = ["v", "o"]\n'
        "[train]\nsteps = 3\nbatch = 4\nwarmup = 1\n"
    )
    succeed(
        capfd,
        "pretrain",
        tmp_path / "run",
        "--config",
        recipe,
        "--train.steps",
        "2",
        "--kind.tailor-rank",
        "2",
    )
    config = json.loads((tmp_path / "run" / "run.json").read_text())["description"]["config"]
    assert config["train"]["steps"] == 2
    assert config["train"]["batch"] == 4
    assert config["kind"] == {
        "learngene_rank": 8, "tailor_rank": 2, "init": config["kind"]["init"], "gate": "class",
        "targets": ["v", "o"],
    }  # fmt: skip


def test_decompose_writes_a_file_for_each_class(toys: Path, tmp_path: Path, capfd) -> None:
    assert (
        succeed(capfd, "decompose", toys / "run" / "model", tmp_path / "parts") == f"{tmp_path / 'parts'}\n"
    )
    names = {p.name for p in (tmp_path / "parts" / "tailors").iterdir()}
    assert names == {f"{shape}.safetensors" for shape in SHAPES}
    assert files_of(tmp_path / "parts").keys() == files_of(toys / "parts").keys()
    assert [a for a, _ in files_of(tmp_path / "parts").values()] == [
        a for a, _ in files_of(toys / "parts").values()
    ]


def test_recombine_some_classes_at_a_lower_rank(toys: Path, tmp_path: Path, capfd) -> None:
    succeed(
        capfd, "recombine", toys / "parts", tmp_path / "small",
        "--classes", "ramp", "disc", "--learngene-rank", "3", "--tailor-rank", "1", "--layers", "factored",
    )  # fmt: skip
    small = DiT.from_pretrained(tmp_path / "small")
    assert small.classes.names == ("ramp", "disc")
    assert (small.structure["rank"], small.structure["tailor_rank"]) == (3, 1)
    succeed(capfd, "recombine", toys / "parts", tmp_path / "one", "--classes", "chess", "--layers", "merged")
    assert DiT.from_pretrained(tmp_path / "one").structure is None


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--share", "task"],
        ["--init", "nearest"],
        ["--init", "nearest", "--trains", "mixture", "--mixes", 3],
    ],
)
def test_transfer_then_sample_and_decompose(toys: Path, tmp_path: Path, capfd, options) -> None:
    arguments = [
        "transfer", toys / "parts", tmp_path / "run", "--data.source", toys / "new-shapes",
        "--data.size", SIZE, "--rank", 2, *LOOP, *options,
    ]  # fmt: skip
    assert succeed(capfd, *arguments) == f"{tmp_path / 'run' / 'model'}\n"
    before = files_of(tmp_path / "run")
    succeed(capfd, *arguments)
    assert files_of(tmp_path / "run") == before, "a finished transfer changes nothing"
    taught = DiT.from_pretrained(tmp_path / "run" / "model")
    assert taught.classes.names == NEW_SHAPES
    assert taught.structure["slots"] == (1 if "task" in options else 2)
    succeed(capfd, "decompose", tmp_path / "run" / "model", tmp_path / "new-parts")
    assert (
        load_components(tmp_path / "new-parts").learngene_hash
        == load_components(toys / "parts", ()).learngene_hash
    )
    succeed(capfd, "sample", tmp_path / "run" / "model", tmp_path / "x.png", "--per-class", 2, "--steps", 2)


def test_sample_a_grid_and_a_folder(toys: Path, tmp_path: Path, capfd) -> None:
    options = ["--classes", "ramp", "bars", "--per-class", "3", "--steps", "2", "--seed", "4"]
    model = toys / "run" / "model"
    assert (
        succeed(capfd, "sample", model, tmp_path / "a" / "x.png", *options) == f"{tmp_path / 'a' / 'x.png'}\n"
    )
    sheet = np.asarray(Image.open(tmp_path / "a" / "x.png"))
    assert sheet.shape == (2 * (SIZE + 2) + 2, 3 * (SIZE + 2) + 2, 3)

    succeed(capfd, "sample", model, tmp_path / "folder", *options)
    found = sorted(str(p.relative_to(tmp_path / "folder")) for p in (tmp_path / "folder").rglob("*.png"))
    assert found == [f"bars/{i:06d}.png" for i in (3, 4, 5)] + [f"ramp/{i:06d}.png" for i in (0, 1, 2)]
    for i, name in enumerate(["ramp"] * 3 + ["bars"] * 3):
        y, x = 2 + i // 3 * (SIZE + 2), 2 + i % 3 * (SIZE + 2)
        picture = np.asarray(Image.open(tmp_path / "folder" / name / f"{i:06d}.png"))
        assert np.array_equal(picture, sheet[y : y + SIZE, x : x + SIZE])

    # again into the same folder: replaced, and learngenes alone are other pictures
    before = files_of(tmp_path / "folder")
    succeed(capfd, "sample", model, tmp_path / "folder", *options, "--learngenes-only")
    after = files_of(tmp_path / "folder")
    assert after.keys() == before.keys()
    assert any(after[name][0] != before[name][0] for name in after)


def test_inspect_a_model_and_parts(toys: Path, capfd) -> None:
    table = succeed(capfd, "inspect", toys / "run" / "model")
    assert "learngene rank 8, tailor rank 2, 4 slots" in table
    assert "total" in table
    facts = json.loads(succeed(capfd, "inspect", toys / "run" / "model", "--json"))
    model = DiT.from_pretrained(toys / "run" / "model")
    assert facts["total"]["parameters"] == sum(p.numel() for p in model.parameters())
    assert facts["classes"] == list(SHAPES)
    of_parts = json.loads(succeed(capfd, "inspect", toys / "parts", "--json"))
    assert of_parts["kind"] == "components"
    assert of_parts["per_class"] == facts["per_class"]
    one = load_components(toys / "parts", ["disc"]).tailors["disc"]
    assert facts["per_class"]["parameters"] == sum(t.numel() for t in one.values())
    assert "components" in succeed(capfd, "inspect", toys / "parts")


def test_env(capfd) -> None:
    facts = json.loads(succeed(capfd, "env", "--json"))
    assert facts["torch"].startswith("2.")
    assert facts["cores"] >= 1
    assert "cache" in succeed(capfd, "env")


def test_encode_then_train_on_latents(toys: Path, tmp_path: Path, capfd) -> None:
    latents = tmp_path / "latents"
    arguments = [
        "encode", latents, "--data.source", toys / "shapes", "--data.size", SIZE, "--steps", 6, "--batch", 8,
        "--model.width", 8, "--precision", "fp32",
    ]  # fmt: skip
    assert succeed(capfd, *arguments) == f"{latents}\n"
    before = files_of(latents)
    succeed(capfd, *arguments)
    assert files_of(latents) == before
    shape = ["--model.width", 32, "--model.depth", 1, "--model.heads", 2, "--model.patch", 2]
    kind = ["--kind.learngene-rank", 8, "--kind.tailor-rank", 2]
    succeed(capfd, "pretrain", tmp_path / "run", "--data.source", latents, *shape, *kind, *LOOP)
    model = DiT.from_pretrained(tmp_path / "run" / "model")
    assert (model.config.channels, model.config.input_size) == (4, 4)
    # the autoencoder goes along through every verb, and pictures come out at full size
    succeed(capfd, "decompose", tmp_path / "run" / "model", tmp_path / "parts")
    succeed(capfd, "recombine", tmp_path / "parts", tmp_path / "one", "--classes", "disc")
    succeed(capfd, "sample", tmp_path / "one", tmp_path / "x.png", "--per-class", 2, "--steps", 2)
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.size == (2 * (SIZE + 2) + 2, SIZE + 4)
    new = [
        "encode", tmp_path / "new-latents", "--data.source", toys / "new-shapes", "--data.size", SIZE,
        "--autoencoder", latents / "autoencoder", "--batch", 8,
    ]  # fmt: skip
    succeed(capfd, *new)
    succeed(
        capfd, "transfer", tmp_path / "parts", tmp_path / "new", "--data.source", tmp_path / "new-latents",
        "--rank", 1, *LOOP,
    )  # fmt: skip
    succeed(capfd, "sample", tmp_path / "new" / "model", tmp_path / "new.png", "--per-class", 1, "--steps", 1)


def test_demo_and_the_demo_again(tmp_path: Path, capfd) -> None:
    page = tmp_path / "demo" / "index.html"
    assert succeed(capfd, "demo", tmp_path / "demo", "--size", "smoke") == f"{page.resolve()}\n"
    html = page.read_text()
    for words in ("voxel-art", "cutouts", "learngenes alone", "GMACs", "data:image/png;base64,"):
        assert words in html
    assert 'src="http' not in html, "the page stands by itself"
    before = files_of(tmp_path / "demo")
    succeed(capfd, "demo", tmp_path / "demo", "--size", "smoke")
    after = files_of(tmp_path / "demo")
    assert {k: content for k, (content, _) in after.items()} == {
        k: content for k, (content, _) in before.items()
    }
    written_again = {name for name in after if after[name] != before[name]}
    assert not any("/" in name for name in written_again), "only the page and its pictures are made again"


@pytest.mark.slow
def test_an_interrupted_demo_goes_on(tmp_path: Path) -> None:
    """Stopped in the pre-training and killed in the transfer, the demo ends with the same page."""
    import signal

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    command = [kindiff_script(), "demo", "--size", "smoke"]

    def start_until(sign: Path) -> subprocess.Popen[bytes]:
        process = subprocess.Popen([*command, broken], env=one_thread(), stderr=subprocess.DEVNULL)
        while not sign.exists():
            assert process.poll() is None
            time.sleep(0.002)
        return process

    subprocess.run([*command, whole], env=one_thread(), check=True)
    process = start_until(broken / "pretrain" / "checkpoints" / "step-00000010")
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 143
    process = start_until(broken / "transfer" / "run.json")
    process.kill()
    process.wait()
    subprocess.run([*command, broken], env=one_thread(), check=True)
    for name in ("pretrain/model", "transfer/model", "four-classes", "novel-parts"):
        contents = [{k: v for k, (v, _) in files_of(place / name).items()} for place in (whole, broken)]
        assert contents[0] == contents[1], name
    assert (broken / "index.html").read_text() == (whole / "index.html").read_text()
