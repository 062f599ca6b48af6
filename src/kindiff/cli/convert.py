"""kindiff convert"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from kindiff.errors import UsageError

if TYPE_CHECKING:
    from kindiff.classes import ClassSet
    from kindiff.components import Components
    from kindiff.models import DiT


@dataclass(frozen=True, kw_only=True)
class Args:
    """Read and write other projects' DiT files: the published .pt layout, diffusers' transformer and pipeline."""

    source: tyro.conf.Positional[Path]
    """A .pt or .safetensors file (released), a folder (diffusers), a model or components directory (kindiff)."""
    out: tyro.conf.Positional[Path]
    """What to write: a model directory (kindiff), a .pt or .safetensors file (released), a folder (diffusers,
    pipeline)."""
    from_: Annotated[Literal["released", "diffusers", "kindiff"], tyro.conf.arg(name="from")]
    """Layout of the source."""
    to: Literal["kindiff", "released", "diffusers", "pipeline"]
    """Layout to write. pipeline: a folder that diffusers.DiTPipeline loads by itself."""
    names: str = ""
    """Class names of a foreign checkpoint: a text file, one a line, or imagenet (its folder names)."""
    heads: int = 0
    """Attention heads of a released file of unpublished size."""
    objective: Literal["auto", "flow", "epsilon"] = "auto"
    """Objective of a released file; auto: epsilon, told by its doubled output channels."""
    time_features: Literal["published", "diffusers"] = "diffusers"
    """Timestep features of a diffusers folder; published for weights that were trained with the published ones
    and copied into this layout."""
    time: Literal["fit", "copy"] = "fit"
    """How a model with the published timestep features goes to diffusers. fit: exact at the timesteps of `steps`
    sampling steps. copy: the weights as they are, lossless to read back, with other outputs."""
    steps: int = 50
    """Sampling steps of the fit; its divisors are exact too."""
    vae: Path | None = None
    """Folder of the diffusers AutoencoderKL that decodes a pipeline's latents; the source's own where it has one."""
    classes: tuple[str, ...] = ()
    """Classes of a components directory or decomposable model: one merged model, or one pipeline folder each."""
    learngene_rank: int | None = None
    """Keep that many learngene components; all when not given."""


def run(args: Args) -> None:
    """Read, convert, write."""
    from kindiff.bridges import diffusers_dit, diffusers_pipeline, released
    from kindiff.components import Components

    _check(args)
    model = _read(args)
    if args.to == "pipeline":
        vae = args.vae or args.source / "autoencoder"
        if isinstance(model, Components):
            _pipelines(args, model, vae)
        else:
            diffusers_pipeline.export_pipeline(model, vae, args.out, steps=args.steps)
            print(args.out)
        return
    if isinstance(model, Components):
        model = model.recombine(learngene_rank=args.learngene_rank, layers="merged")
    if args.to == "kindiff":
        model.save_pretrained(args.out)
    elif args.to == "released":
        released.save_released(model, args.out)
    else:
        timesteps = diffusers_pipeline.pipeline_timesteps(model.config, args.steps)
        diffusers_dit.save_diffusers(model, args.out, time=args.time, timesteps_N=timesteps)
    print(args.out)


def _pipelines(args: Args, parts: Components, vae: Path) -> None:
    from kindiff.bridges.diffusers_pipeline import export_classes, guidance_gap
    from kindiff.progress import say

    folders = export_classes(
        parts, parts.classes, vae, args.out, learngene_rank=args.learngene_rank, steps=args.steps
    )
    for folder in folders:
        gap = guidance_gap(parts, folder.name, learngene_rank=args.learngene_rank)
        say(
            f"{folder.name}: guided (scale 4), the exported predictions differ from ours by {gap['guided']:.1%}, "
            "because a merged model's tailor is on in the null pass too; without guidance they are equal"
        )
        print(folder)


def _read(args: Args) -> DiT | Components:
    from kindiff import checkpoint
    from kindiff.bridges.diffusers_dit import load_diffusers
    from kindiff.bridges.released import load_released
    from kindiff.components import decompose, load_components
    from kindiff.models import DiT

    if args.from_ == "released":
        return load_released(args.source, classes=_names(args), heads=args.heads, objective=args.objective)
    if args.from_ == "diffusers":
        return load_diffusers(args.source, classes=_names(args), time_features=args.time_features)
    if not (args.source / "config.json").is_file():
        raise FileNotFoundError(
            f"{args.source} is neither a model nor a components directory: it has no config.json."
        )
    if checkpoint.read_json(args.source / "config.json").get("kind") == "components":
        return load_components(args.source, args.classes or None)
    model = DiT.from_pretrained(args.source)
    if model.structure is None:
        if args.classes or args.learngene_rank:
            raise UsageError(f"{args.source} is a dense model; leave out --classes and --learngene-rank.")
        return model
    parts = decompose(model)
    wanted = args.classes or parts.classes
    unknown = [name for name in wanted if name not in parts.classes]
    if unknown:
        model.classes.id(unknown[0])  # names the nearest
    return Components(parts.config, parts.targets, parts.learngenes, {n: parts.tailors[n] for n in wanted})


def _check(args: Args) -> None:
    """No option is accepted and ignored."""
    foreign, to_diffusers = args.from_ != "kindiff", args.to in ("diffusers", "pipeline")
    misplaced = {
        "--names": (bool(args.names), foreign, "--from released or diffusers"),
        "--heads": (bool(args.heads), args.from_ == "released", "--from released"),
        "--objective": (args.objective != "auto", args.from_ == "released", "--from released"),
        "--time-features": (args.time_features != "diffusers", args.from_ == "diffusers", "--from diffusers"),
        "--time": (args.time != "fit", args.to == "diffusers", "--to diffusers"),
        "--steps": (args.steps != 50, to_diffusers, "--to diffusers or pipeline"),
        "--vae": (args.vae is not None, args.to == "pipeline", "--to pipeline"),
        "--classes": (bool(args.classes), not foreign, "--from kindiff"),
        "--learngene-rank": (args.learngene_rank is not None, not foreign, "--from kindiff"),
    }
    for option, (given, fits, where) in misplaced.items():
        if given and not fits:
            raise UsageError(f"{option} goes with {where} only.")
    if args.steps < 1:
        raise UsageError(f"steps is {args.steps}; it must be at least 1.")
    own = args.source / "autoencoder" / "config.json"
    if args.to == "pipeline" and args.vae is None and not own.is_file():
        raise UsageError(
            "a pipeline decodes latents with a diffusers AutoencoderKL; give its folder with --vae. Models of pixels, "
            "or of kindiff's own small autoencoder, cannot become one: --to diffusers writes the transformer alone."
        )
    if not foreign and args.to == "kindiff":
        raise UsageError("both sides are kindiff's; `kindiff recombine` makes models from parts.")


def _names(args: Args) -> ClassSet | None:
    from kindiff.data.hierarchy import read_names

    return read_names(args.names) if args.names else None
