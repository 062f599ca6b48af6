"""A merged model of one class as a folder that diffusers.DiTPipeline loads and samples by itself.

diffusers' pipeline takes row 1000 of the label embedding for the null class, so the table is laid out for that:
row 0 is the class (rows 1 to 999 repeat it, so that no id draws something else) and row 1000 the null row.

The null pass of guidance: our models switch the tailor off there, a dense model cannot. In an exported pipeline the
tailor is on in both passes and only the embedding differs; `guidance_gap` measures what that changes.

B batch, C latent channels.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kindiff import checkpoint
from kindiff.bridges import reading
from kindiff.bridges.diffusers_dit import CLASS, WEIGHTS, to_diffusers
from kindiff.classes import ClassSet
from kindiff.components import Components
from kindiff.config import DiTConfig
from kindiff.diffusion import gaussian
from kindiff.errors import BadFileError, UsageError
from kindiff.models.codec import open_codec
from kindiff.models.dit import DiT

NULL_ROW = 1000
"""The row that diffusers' pipeline takes for the null class."""
STEPS = 50
"""Sampling steps of diffusers' pipeline unless told otherwise."""
SHARD = WEIGHTS + "-{number:05d}-of-00002.safetensors"


def export_pipeline(model: DiT, vae: str | Path, out: str | Path, *, steps: int = STEPS) -> None:
    """Write a dense model of one or more classes (merged, or dense from the start) as a diffusers pipeline.

    vae: folder of the diffusers AutoencoderKL whose latents, times its scaling factor, the model was trained on.
    steps: for a model with the published timestep features, the number of sampling steps (and every divisor of
    it) at which the pipeline computes what the model does; with diffusers' features it always does. UsageError
    for a pixel model, components, more than 1000 classes or an autoencoder that does not fit or is another one.
    """
    with checkpoint.new_directory(Path(out)) as folder:
        _write(model, Path(vae), folder, steps)


def export_classes(
    parts: Components,
    classes: Iterable[str],
    vae: str | Path,
    out: str | Path,
    *,
    learngene_rank: int | None = None,
    steps: int = STEPS,
) -> list[Path]:
    """One pipeline folder a class below `out`, each of which diffusers loads by itself.

    What they share (autoencoder, scheduler, all tensors that are not the class's) is one file, hard-linked into
    every folder. Returns the folders. Raises what `recombine` and `export_pipeline` raise.
    """
    names = ClassSet(tuple(classes)).names
    with checkpoint.new_directory(Path(out)) as folder:
        for name in names:
            model = parts.recombine([name], learngene_rank=learngene_rank, layers="merged")
            first = folder / names[0] if name != names[0] else None
            (folder / name).mkdir()
            _write(model, Path(vae), folder / name, steps, shards=len(names) > 1, shared_with=first)
    return [Path(out) / name for name in names]


def scheduler_config(config: DiTConfig) -> dict[str, Any]:
    """The diffusers scheduler of a model: DDIM for epsilon models, first-order flow steps for flow models.

    Epsilon: our `ddim` with spacing trailing, for every number of steps that divides 1000. Flow: Euler's method
    over `flow_grid` (diffusers' flow-matching Euler scheduler does not work in its DiT pipeline).
    """
    if config.objective == "flow":
        return {
            "_class_name": "DPMSolverMultistepScheduler",
            "num_train_timesteps": 1000,
            "prediction_type": "flow_prediction",
            "use_flow_sigmas": True,
            "flow_shift": 1.0,
            "solver_order": 1,
            "algorithm_type": "dpmsolver++",
            "final_sigmas_type": "zero",
        }
    return {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": gaussian.STEPS,
        "beta_start": 1e-4,
        "beta_end": 0.02,
        "beta_schedule": "linear" if config.schedule == "linear" else "squaredcos_cap_v2",
        "prediction_type": "epsilon",
        "clip_sample": False,
        "set_alpha_to_one": True,
        "steps_offset": 0,
        "timestep_spacing": "trailing",
    }


def flow_grid(steps: int) -> Tensor:
    """Times of an exported flow pipeline: (steps + 1,) float64, evenly spaced from 0.999 to 0."""
    return torch.linspace(0.999, 0, steps + 1, dtype=torch.float64)


def pipeline_timesteps(config: DiTConfig, steps: int) -> Tensor:
    """The timesteps at which a pipeline of `steps` steps calls the model: (steps,); whole numbers."""
    if config.objective == "flow":
        return (flow_grid(steps)[:-1] * 1000 + 1e-9).floor()
    return gaussian.respaced(gaussian.schedule(config.schedule), steps, spacing="trailing").timesteps


@torch.inference_mode()
def guidance_gap(
    parts: Components,
    name: str,
    *,
    learngene_rank: int | None = None,
    scale: float = 4.0,
    batch: int = 8,
    seed: int = 0,
) -> dict[str, float]:
    """How far the exported null pass is from ours, on noise at evenly spread timesteps.

    null: RMS difference of the two null predictions over the RMS of ours (tailor off). guided: the same of the
    guided predictions at this scale. conditional: of the class predictions, which only rounding tells apart.
    """
    config = parts.config
    ours, merged = (
        parts.recombine([name], learngene_rank=learngene_rank, layers=how) for how in ("auto", "merged")
    )
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, config.channels, config.input_size, config.input_size, generator=generator)
    t_B = torch.linspace(0, 999, batch).round()
    rows = torch.zeros(batch, dtype=torch.int64)
    class_a, class_b = (model.eval()(x, t_B, rows)[:, : config.channels] for model in (ours, merged))
    on_B = rows + 1 if config.null_gate == "off" else rows
    null_a, null_b = (model(x, t_B, rows + 1, on_B)[:, : config.channels] for model in (ours, merged))
    guided_a, guided_b = (n + scale * (c - n) for c, n in ((class_a, null_a), (class_b, null_b)))
    pairs = {
        "conditional": (class_a, class_b),
        "null": (null_a, null_b),
        "guided": (guided_a, guided_b),
    }
    return {
        what: float((a - b).square().mean().sqrt() / a.square().mean().sqrt())
        for what, (a, b) in pairs.items()
    }


def _write(
    model: DiT, vae: Path, folder: Path, steps: int, *, shards: bool = False, shared_with: Path | None = None
) -> None:
    _check(model, vae)
    description, tensors = to_diffusers(
        _with_null_at_1000(model), timesteps_N=pipeline_timesteps(model.config, steps)
    )
    (folder / "transformer").mkdir()
    (folder / "vae").mkdir()
    (folder / "scheduler").mkdir()
    checkpoint.write_json(folder / "transformer" / "config.json", description)
    if shards:
        _write_shards(tensors, folder / "transformer", shared_with and shared_with / "transformer")
    else:
        checkpoint.write_tensors(folder / "transformer" / f"{WEIGHTS}.safetensors", tensors, {"format": "pt"})
    for path in sorted(p for p in vae.iterdir() if p.is_file() and not p.name.startswith(".")):
        if shared_with is not None:
            os.link(shared_with / "vae" / path.name, folder / "vae" / path.name)
        else:
            shutil.copyfile(path, folder / "vae" / path.name)
    scheduler = scheduler_config(model.config)
    checkpoint.write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    index = {
        "_class_name": "DiTPipeline",
        "id2label": {str(i): name for i, name in enumerate(model.classes.names)},
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "transformer": ["diffusers", CLASS],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    checkpoint.write_json(folder / "model_index.json", index)


def _check(model: DiT, vae: Path) -> None:
    if len(model.classes) > NULL_ROW:
        raise UsageError(
            f"the model has {len(model.classes)} classes; diffusers' pipeline takes id {NULL_ROW} for the null class, "
            f"so at most {NULL_ROW} fit. Export some of them."
        )
    if model.config.channels == 3 and not model.config.autoencoder:
        raise UsageError(
            "the model works on pixels and a diffusers DiT pipeline on latents of an AutoencoderKL; convert --to "
            "diffusers writes the transformer alone."
        )
    if not (vae / "config.json").is_file():
        raise FileNotFoundError(
            f"{vae} is no folder of a diffusers AutoencoderKL (it has no config.json); give --vae the folder that "
            "encoded the model's latents."
        )
    description = checkpoint.read_json(vae / "config.json")
    if description.get("_class_name") != "AutoencoderKL":
        what = description.get("_class_name") or description.get("kind")
        raise UsageError(
            f"{vae} holds a {what!r}; a diffusers pipeline decodes with an AutoencoderKL only, so a model of other "
            "latents cannot become one."
        )
    if description.get("latent_channels") != model.config.channels:
        raise BadFileError(
            f"{vae} has {description.get('latent_channels')} latent channels and the model {model.config.channels}."
        )
    if ignored := [name for name in ("shift_factor", "latents_mean", "latents_std") if description.get(name)]:
        raise UsageError(
            f"{vae} has a {ignored[0]}, which diffusers' DiT pipeline ignores: its pictures would be wrong."
        )
    if model.config.autoencoder and open_codec(vae).fingerprint() != model.config.autoencoder:
        raise UsageError(f"{vae} is not the autoencoder whose latents the model was trained on.")


def _with_null_at_1000(model: DiT) -> DiT:
    """The same model with 1000 class rows and the null row at 1000."""
    state = reading.dense_state(model)
    rows = state["class_embed.weight"]
    classes, null = rows[:-1], rows[-1:]
    # one class: every id draws it; several: ids beyond them draw what the null row does
    filling = (classes if len(classes) == 1 else null).expand(NULL_ROW - len(classes), -1)
    state["class_embed.weight"] = torch.cat([classes, filling, null])
    fields = {name: getattr(model.config, name) for name in model.config.__dataclass_fields__}
    return reading.filled(DiTConfig(**fields | {"num_classes": NULL_ROW}), None, state)


def _write_shards(tensors: dict[str, Tensor], folder: Path, shared_with: Path | None) -> None:
    """Two files and their index: what all classes share, and what is the class's own."""
    own = {name for name in tensors if _is_the_classs(name)}
    files = {1: set(tensors) - own, 2: own}
    for number, names in files.items():
        path = folder / SHARD.format(number=number)
        if number == 1 and shared_with is not None:
            os.link(shared_with / path.name, path)
        else:
            checkpoint.write_tensors(path, {name: tensors[name] for name in names}, {"format": "pt"})
    total = sum(tensor.nbytes for tensor in tensors.values())
    weight_map = {name: SHARD.format(number=n) for n, names in files.items() for name in sorted(names)}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    checkpoint.write_json(folder / f"{WEIGHTS}.safetensors.index.json", index)


def _is_the_classs(name: str) -> bool:
    """Merged weights and the label table belong to the class; biases, modulations, embedders are shared."""
    merged = ("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight", "proj.weight", "net.2.weight")
    return name.endswith("embedding_table.weight") or (
        name.startswith("transformer_blocks.") and name.endswith(merged)
    )
