"""A model card (README.md of a model directory) from what is recorded beside the model, and pushing to the hub.

What is not recorded is left out: a card states no figure that nobody measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kindiff import checkpoint
from kindiff.classes import shorten
from kindiff.errors import BadFileError, UsageError
from kindiff.evaluate.cost import cost_table, total
from kindiff.models.dit import DiT

CARD = "README.md"
SCORES = ("distance", "spatial_distance", "inception_score", "precision", "recall", "kid", "accuracy")
"""The numbers of a score.json (`kindiff evaluate --out`) that a card shows."""


def write_card(model: str | Path, *, run: str | Path | None = None, scores: str | Path | None = None) -> str:
    """Write README.md into a model directory and return its text.

    run: the run directory (None: the folder above, where it holds a run.json). scores: a score.json of `kindiff
    evaluate`. FileNotFoundError or BadFileError names what is missing or not what it should be.
    """
    folder = Path(model)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} is no model directory: it has no config.json.")
    text = "\n".join(_lines(folder, _run_of(folder, run), _score_of(scores))) + "\n"
    checkpoint.write_file(folder / CARD, text.encode())
    return text


def push_to_hub(model: str | Path, repository: str, *, private: bool = False) -> str:
    """Upload a model directory (or an exported pipeline) with its card; returns its address.

    The account is the one that `hf auth login` stored or HF_TOKEN names. ModuleNotFoundError names the extra;
    UsageError when there is no card yet, or for a name that the hub does not allow; OSError when it cannot be reached.
    """
    folder = Path(model)
    if not (folder / CARD).is_file():
        raise UsageError(
            f"{folder} has no {CARD}; write one first (write_card, or `kindiff push` does both)."
        )
    try:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HFValidationError
    except ImportError:
        raise ModuleNotFoundError(
            "pushing needs the package huggingface_hub; install it with: pip install 'kindiff[hf]'"
        ) from None
    hub = HfApi()
    try:
        hub.create_repo(repository, private=private, exist_ok=True)
        hub.upload_folder(repo_id=repository, folder_path=str(folder), commit_message=f"Upload {folder.name}")
    except HFValidationError as error:
        raise UsageError(f"{repository!r} is no name of a repository: {str(error).splitlines()[0]}") from None
    except OSError:
        raise
    except Exception as error:  # its client's own, of several libraries
        raise OSError(f"the hub did not take {folder}: {type(error).__name__}: {error}") from error
    return f"https://huggingface.co/{repository}"


def _run_of(folder: Path, run: str | Path | None) -> dict[str, Any]:
    path = Path(run) / "run.json" if run else folder.resolve().parent / "run.json"
    if run and not path.is_file():
        raise FileNotFoundError(f"{run} is no run directory: it has no run.json.")
    return checkpoint.read_json(path) if path.is_file() else {}


def _score_of(path: str | Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    if not Path(path).is_file():
        raise FileNotFoundError(f"scores {path} do not exist; `kindiff evaluate --out` writes score.json.")
    score = checkpoint.read_json(Path(path))
    if not {"distance", "distance_name", "protocol"} <= score.keys():
        raise BadFileError(f"{path} holds no scores; give a score.json of `kindiff evaluate --out`.")
    return score


def _lines(folder: Path, run: Mapping[str, Any], score: Mapping[str, Any]) -> list[str]:
    model = DiT.from_pretrained(folder)
    config, structure = model.config, model.structure or {}
    front = ["---", "library_name: kindiff", "tags:", "- diffusion", "- dit", "- class-conditional"]
    front += ["- kind", "- decomposable", "---", ""] if structure else ["---", ""]
    kind = "Decomposable diffusion transformer" if structure else "Diffusion transformer"
    space = "latents" if config.on_latents else "pixels"
    facts = {
        "Backbone": f"DiT, width {config.width}, depth {config.depth}, {config.heads} heads, patch {config.patch}",
        "Works on": f"{config.input_size} x {config.input_size} {space}, {config.channels} channels",
        "Objective": config.objective
        + (f", {config.schedule} schedule" if config.objective == "epsilon" else ""),
        "Classes": f"{len(model.classes)}: {shorten(model.classes.names)}",
    }
    if structure:
        facts["Components"] = (
            f"learngene rank {structure['rank'] or 'folded into dense weights'}, {structure['slots']} tailors of rank "
            f"{structure['tailor_rank']}, gate {structure['gate']}"
        )
    cost = total(cost_table(model))
    facts["Cost"] = (
        f"{cost.parameters:,} parameters, {cost.bytes / 2**20:.1f} MiB, {cost.macs / 1e9:.3f} GMACs an image "
        "(multiply-accumulates of one forward pass, attention included)"
    )
    lines = [*front, f"# {folder.resolve().parent.name if run else folder.name}", ""]
    lines += [
        f"{kind} made with kindiff (KIND: Knowledge Integration and Diversion in Diffusion Models).",
        "",
    ]
    lines += _table(facts) + _training(run) + _scores(score)
    return [*lines, "## Use", "```python", *_use(model), "```"]


def _training(run: Mapping[str, Any]) -> list[str]:
    description = run.get("description") or {}
    settings = description.get("config") or {}
    train, data = settings.get("train") or {}, settings.get("data") or {}
    if not train:
        return []
    facts = {
        "Command": f"kindiff {description.get('command')}",
        "Data": f"{data.get('source')}, SHA-256 {str(description.get('data'))[:16]}",
        "Steps": f"{train.get('steps'):,} of {train.get('batch')} samples, learning rate {train.get('lr')}",
        "Precision, seed": f"{train.get('precision')}, seed {train.get('seed')}",
    }
    if settings.get("init"):
        facts["Started from"] = f"weights with SHA-256 {str(description.get('init'))[:16]}"
    if hardware := run.get("hardware"):
        facts["Hardware"] = (
            hardware.get("gpu") or f"{hardware.get('processor')}, {hardware.get('cores')} cores"
        )
    if versions := run.get("versions"):
        facts["Versions"] = ", ".join(f"{name} {number}" for name, number in versions.items())
    return ["## Training", "", *_table(facts)]


def _scores(score: Mapping[str, Any]) -> list[str]:
    if not score:
        return []
    names = {"distance": str(score["distance_name"])}
    facts = {
        names.get(key, key.replace("_", " ")): f"{score[key]:.4f}"
        for key in SCORES
        if isinstance(score.get(key), float | int)
    }
    if isinstance(score.get("floor"), float):
        facts["real/real floor"] = f"{score['floor']:.4f} {score.get('floor_note', '')}".strip()
    protocol = {
        f"protocol: {k}": str(v) for k, v in score["protocol"].items() if isinstance(v, str | int | float)
    }
    return ["## Scores", "", *_table(facts | protocol)]


def _table(facts: Mapping[str, str]) -> list[str]:
    rows = [f"| {name} | {value.replace('|', '/')} |" for name, value in facts.items()]
    return ["| | |", "|---|---|", *rows, ""]


def _use(model: DiT) -> list[str]:
    return [
        "from kindiff import DiTPipeline, SampleConfig",
        "",
        'pipeline = DiTPipeline.from_pretrained("this directory")',
        f"images = pipeline.sample([0], SampleConfig())  # a picture of {model.classes.names[0]!r}",
    ]
