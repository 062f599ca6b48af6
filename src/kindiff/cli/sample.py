"""kindiff sample"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from kindiff.config import SampleConfig


@dataclass(frozen=True, kw_only=True)
class Args:
    """Draw images of some classes, mixed in one batch: one grid (OUT.png) or a folder of files."""

    model: tyro.conf.Positional[Path]
    """Model directory."""
    out: tyro.conf.Positional[Path]
    """A .png file for a grid (a row for each class), else a folder: <class>/<index>.png."""
    classes: tuple[str, ...] = ()
    """Classes to draw; none for all of the model's."""
    per_class: int = 8
    """Images of each class."""
    learngenes_only: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Switch the tailors off and keep the class embeddings."""
    config: Path | None = None
    """Recipe (TOML) whose values the options below override."""
    recipe: Annotated[SampleConfig, tyro.conf.arg(name="")] = field(default_factory=SampleConfig)


def run(args: Args) -> None:
    """Sample and write."""
    from kindiff.checkpoint import PICTURES, check_replaceable
    from kindiff.errors import UsageError
    from kindiff.images import grid, write_folder, write_png
    from kindiff.parallel import joined
    from kindiff.pipeline import DiTPipeline
    from kindiff.progress import Track, show

    if args.per_class < 1:
        raise UsageError(f"per_class is {args.per_class}; it must be at least 1.")
    as_grid = args.out.suffix.lower() == ".png"
    if not as_grid:
        check_replaceable(args.out, PICTURES)
    pipeline = DiTPipeline.from_pretrained(args.model)
    pipeline.check_draws_pictures()
    names = args.classes or pipeline.model.classes.names
    ids = [i for i in pipeline.model.classes.ids(names) for _ in range(args.per_class)]
    with joined() as ranks:
        with Track("sampling", len(ids), unit="images") as track:
            images = pipeline.sample(
                ids, args.recipe, tailors=not args.learngenes_only, advance=track.advance, ranks=ranks
            )
        if ranks.first and as_grid:
            write_png(args.out, grid(images, columns=args.per_class))
        elif ranks.first:
            write_folder(args.out, images, [name for name in names for _ in range(args.per_class)])
    show(args.out)
