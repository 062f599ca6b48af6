"""A step that was not taken, kept whole: enough to run it again (`kindiff replay`) and say what is wrong with it.

A capsule is a directory: capsule.json (step, positions, seed, what was found, the run's description, versions), model/
(the weights before the step) and batch.safetensors (its inputs as they were).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kindiff import checkpoint, runtime
from kindiff.config import DataConfig, ObjectiveConfig, RivalConfig, TrainConfig, from_dict, to_dict
from kindiff.data import open_samples
from kindiff.data.batches import Batch, make_batch
from kindiff.diffusion import loss_of
from kindiff.errors import BadFileError, UsageError
from kindiff.models.dit import DiT
from kindiff.rivals import RIVALS, start
from kindiff.rivals.learngenes import BANKS, constrained

FORMAT = 2


def write_capsule(
    run_folder: Path,
    model: DiT,
    batch: Batch,
    *,
    step: int,
    found: str,
    objective: ObjectiveConfig,
    config: TrainConfig,
    flip: bool,
) -> None:
    """Write a step's capsule into the run: the whole model and the batch of all ranks."""
    with checkpoint.new_directory(capsule_of(run_folder, step), overwrite=True) as folder:
        description = {
            "format": FORMAT,
            "kind": "capsule",
            "step": step,
            "seed": config.seed,
            "first_position": step * config.batch,
            "batch": config.batch,
            "flip": flip,
            "precision": config.precision,
            "objective": to_dict(objective),
            "trained": [name for name, p in model.named_parameters() if p.requires_grad],
            "found": found,
            "run": checkpoint.read_json(run_folder / "run.json")["description"],
            "versions": runtime.versions(),
            "hardware": runtime.hardware(),
        }
        checkpoint.write_json(folder / "capsule.json", description)
        checkpoint.write_tensors(folder / "batch.safetensors", batch._asdict())
        (folder / "model").mkdir()
        model.write_files(folder / "model")


def capsule_of(run_folder: Path, step: int) -> Path:
    """The directory of a step's capsule."""
    return run_folder / "capsules" / f"step-{step:08d}"


def replay(folder: Path) -> dict[str, Any]:
    """Run a capsule's step again on this machine's processor; what is and is not finite, as plain values.

    Where the data are there, the batch is drawn from them again and compared. BadFileError when the capsule is damaged,
    FileNotFoundError when there is none.
    """
    description = _description(folder)
    batch = _batch(folder)
    model = DiT.from_pretrained(folder / "model", wrap=_wrap(folder / "capsule.json", description))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in description["trained"])
    loss_function = loss_of(model.config)
    with runtime.autocast(torch.device("cpu"), description["precision"]):
        per_sample = loss_function(
            lambda x, t: model(x, t, batch.ids_B, batch.gate_ids_B), batch.x_BCHW, batch.noise_BCHW, batch.u_B
        )
    loss = per_sample.mean()
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    norm = torch.nn.utils.get_total_norm(list(gradients.values()))
    first = description["first_position"]
    facts: dict[str, Any] = {
        "step": description["step"],
        "positions": [first, first + description["batch"] - 1],
        "found then": description["found"],
        "loss": str(float(loss.detach())),
        "gradient norm": str(float(norm)),
        "inputs that are not finite": _wrong(batch._asdict()),
        "weights that are not finite": _wrong(dict(model.state_dict())),
        "positions whose loss is not finite": [
            first + i for i, ok in enumerate(per_sample.isfinite().tolist()) if not ok
        ],
        "gradients that are not finite": _wrong(gradients),
        "same batch drawn from the data": _drawn_again(description, batch),
    }
    return facts | {"finding": _finding(facts)}


def _finding(facts: dict[str, Any]) -> str:
    if names := facts["weights that are not finite"]:
        return f"the weights were bad before the step: {names[0]}"
    if names := facts["inputs that are not finite"]:
        if facts["same batch drawn from the data"] is False:
            return f"the input {names[0]} was bad, and the data as it is now gives another: a fault of the machine"
        return f"the data is bad: {names[0]}"
    if facts["positions whose loss is not finite"]:
        return "weights and inputs are finite and the loss is not: the arithmetic overflows; try fp32 or a lower rate"
    if facts["gradients that are not finite"] or facts["gradient norm"] in ("nan", "inf"):
        return (
            "the loss is finite and its gradient is not: the arithmetic overflows; try fp32 or a lower rate"
        )
    return (
        "everything is finite this time: the fault is in neither the data nor the weights, but of that moment"
    )


def _wrong(tensors: dict[str, Tensor]) -> list[str]:
    return [name for name, t in tensors.items() if t.is_floating_point() and not t.isfinite().all()]


def _wrap(path: Path, description: dict[str, Any]) -> Callable[[DiT], DiT] | None:
    """What makes of a plain model the one that trained, where a rival's layers or constraint are in it."""
    try:
        config = dict(description["run"].get("config", {}))
        rival = from_dict(RivalConfig, config["rival"]) if "rival" in config else None
        method = config.get("method", "fine")  # no method: FINE's first stage, a run inside that of `adapt`
        if any(str(name).startswith("learngene.") for name in description["trained"]):
            if method not in BANKS:
                raise UsageError(f"method {method!r} has no learngene of its own")
            return lambda model: constrained(model.config, model.classes, method)
    except (UsageError, KeyError, TypeError, ValueError) as error:
        raise BadFileError(f"{path} is damaged, what it says of its run cannot be: {error}") from None
    if rival is None or not RIVALS[rival.method].foreign:
        return None
    return lambda model: start(model, model.classes, rival, seed=0)


def _drawn_again(description: dict[str, Any], batch: Batch) -> bool | str:
    """Whether the data gives the same batch again; a sentence where that cannot be known."""
    settings = description["run"]
    try:
        samples = open_samples(from_dict(DataConfig, settings["config"]["data"]))
        if samples.sha256 != settings["data"]:
            return "the data has changed since"
        again = make_batch(
            samples, from_dict(ObjectiveConfig, description["objective"]), seed=description["seed"],
            first_position=description["first_position"], batch=description["batch"], flip=description["flip"],
        )  # fmt: skip
    except (OSError, UsageError, KeyError, TypeError) as error:
        return f"cannot be known: {error}"
    return all(a.equal(b) for a, b in zip(again, batch, strict=True))


def _batch(folder: Path) -> Batch:
    path = folder / "batch.safetensors"
    tensors = checkpoint.read_tensors(path)
    if set(tensors) != set(Batch._fields):
        raise BadFileError(f"{path} is damaged: it holds {sorted(tensors)}.")
    return Batch(**tensors)


def _description(folder: Path) -> dict[str, Any]:
    path = folder / "capsule.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is no capsule: it has no capsule.json; give RUN/capsules/step-...")
    description = checkpoint.read_json(path)
    kinds = {
        "step": int, "seed": int, "first_position": int, "batch": int, "flip": bool, "precision": str,
        "objective": dict, "trained": list, "found": str, "run": dict,
    }  # fmt: skip
    wrong = [key for key, kind in kinds.items() if not isinstance(description.get(key), kind)]
    if description.get("kind") != "capsule" or description.get("format") != FORMAT or wrong:
        raise BadFileError(f"{path} is not the description of a capsule of format {FORMAT}.")
    return description
