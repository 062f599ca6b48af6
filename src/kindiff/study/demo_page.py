"""The demo's page: real beside generated, learngenes alone beside learngenes and tailor, sizes and costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kindiff.checkpoint import read_json, write_file
from kindiff.config import PretrainConfig, SampleConfig, TransferConfig
from kindiff.data import open_images
from kindiff.evaluate.cost import closed_macs, cost_table, tailor_parameters, total
from kindiff.images import enlarged, grid, write_png
from kindiff.models import DiT
from kindiff.pipeline import DiTPipeline
from kindiff.progress import Track
from kindiff.report.page import heading, page, paragraph, sheet, table


@dataclass(frozen=True)
class DemoFolder:
    """Where the demo puts things."""

    root: Path

    @property
    def pretrain(self) -> Path:
        return self.root / "pretrain"

    @property
    def parts(self) -> Path:
        return self.root / "parts"

    @property
    def one(self) -> Path:
        return self.root / "one-class"

    @property
    def four(self) -> Path:
        return self.root / "four-classes"

    @property
    def transfer(self) -> Path:
        return self.root / "transfer"

    @property
    def novel_parts(self) -> Path:
        return self.root / "novel-parts"

    @property
    def page(self) -> Path:
        return self.root / "index.html"

    @property
    def picture(self) -> Path:
        return self.root / "novel.png"


def demo_page(
    folder: DemoFolder, base: PretrainConfig, novel: TransferConfig, sample: SampleConfig, *, strip: int
) -> None:
    """Sample from every model of the demo; write the page, and a picture of the new classes alone."""
    models = {
        name: DiTPipeline.from_pretrained(path)
        for name, path in (
            ("full", folder.pretrain / "model"),
            ("one", folder.one),
            ("four", folder.four),
            ("novel", folder.transfer / "model"),
        )
    }
    counts = {name: len(p.model.classes) for name, p in models.items()}
    images = strip * (2 * counts["full"] + counts["one"] + counts["four"] + 2 * counts["novel"])
    with Track("sampling", images, unit="images") as track:

        def strips(name: str, *, tailors: bool = True) -> dict[str, np.ndarray]:
            pipeline = models[name]
            ids = [i for i in range(counts[name]) for _ in range(strip)]
            drawn = pipeline.sample(ids, sample, tailors=tailors, advance=track.advance)
            return dict(zip(pipeline.model.classes.names, np.split(drawn, counts[name]), strict=True))

        drawn_full, bare_full = strips("full"), strips("full", tailors=False)
        drawn_one, drawn_four = strips("one"), strips("four")
        drawn_novel, bare_novel = strips("novel"), strips("novel", tailors=False)
    real_base, real_novel = _real(base, strip), _real(novel, strip)

    def rows(
        real: dict[str, np.ndarray], *columns: dict[str, np.ndarray]
    ) -> list[tuple[str, list[np.ndarray]]]:
        return [(name, [real[name], *(c[name] for c in columns)]) for name in columns[0]]

    three = ("real", "learngenes + tailor", "learngenes alone")
    size = base.data.size
    zoom = max(1, round(64 / size))
    few = novel.data.per_class
    body = [
        heading("One pre-training run, many models", 1),
        paragraph(
            f"A diffusion transformer was trained on {counts['full']} classes of drawn avatars ({size} px) as a sum "
            "of rank-1 components. It was taken apart into learngenes, which every class shares, and one tailor for "
            f"each class; smaller models were put together from the parts; {counts['novel']} new classes were "
            f"learned from {few} images each by training only their tailors."
        ),
        paragraph(
            f"Samples: guidance {sample.guidance}, {sample.steps} steps, seed {sample.seed}, none picked.",
            soft=True,
        ),
        heading("New classes: learngenes frozen, fresh tailors"),
        paragraph(
            f"Each new class trained {tailor_parameters(models['novel'].model):,} parameters. Learngenes alone: the "
            "same noise and class embedding with the tailors off."
        ),
        sheet(three, rows(real_novel, drawn_novel, bare_novel), zoom=zoom),
        heading("Recombined models"),
        paragraph(
            f"One class by itself, and four classes at half the learngene rank "
            f"({models['four'].model.structure['rank']} of {models['full'].model.structure['rank']} components), "  # type: ignore[index]
            "without any further training."
        ),
        sheet(
            ("real", "recombined", "the full model"),
            rows(real_base, drawn_one, drawn_full) + rows(real_base, drawn_four, drawn_full),
            zoom=zoom,
        ),
        heading("What they cost"),
        _costs(folder, models),
        paragraph(
            "GMACs: multiply-accumulates of one forward pass of one image, attention included; sampling takes "
            f"{2 * sample.steps - 1} of them, twice with guidance. The dense row is computed, not trained.",
            soft=True,
        ),
        heading("The pre-training classes"),
        sheet(three, rows(real_base, drawn_full, bare_full), zoom=zoom),
        paragraph(_provenance(folder), soft=True),
    ]
    write_file(folder.page, page("kindiff demo", body).encode())
    strips_of_class = [np.concatenate([real_novel[c], drawn_novel[c], bare_novel[c]]) for c in real_novel]
    write_png(folder.picture, enlarged(grid(np.concatenate(strips_of_class), columns=3 * strip), zoom))


def _real(config: PretrainConfig | TransferConfig, strip: int) -> dict[str, np.ndarray]:
    real = open_images(config.data)
    return {name: real.select([name], per_class=strip).images for name in real.classes.names}


def _costs(folder: DemoFolder, models: dict[str, DiTPipeline]) -> str:
    full = models["full"].model
    dense = DiT(full.config, classes=full.classes)
    names = {
        "full": ("pre-trained, all classes", folder.pretrain / "model"),
        "one": ("one class", folder.one),
        "four": ("four classes, half the learngene rank", folder.four),
        "novel": ("new classes", folder.transfer / "model"),
    }
    rows = [_cost_row("dense model of this shape", dense, None)]
    rows += [_cost_row(label, models[name].model, path) for name, (label, path) in names.items()]
    tailor = next((folder.parts / "tailors").iterdir())
    rows.append(
        [
            "one tailor, shipped alone",
            f"{tailor_parameters(full):,}",
            f"{tailor.stat().st_size / 2**20:.2f}",
            "",
        ]
    )
    return table(("model", "parameters", "MiB on disk", "GMACs"), rows)


def _cost_row(label: str, model: DiT, path: Path | None) -> Sequence[str]:
    count = sum(p.numel() for p in model.parameters())
    macs = sum(closed_macs(model.config).values()) if path is None else total(cost_table(model)).macs
    size = count * 4 if path is None else (path / "model.safetensors").stat().st_size
    return [label, f"{count:,}", f"{size / 2**20:.2f}", f"{macs / 1e9:.3f}"]


def _provenance(folder: DemoFolder) -> str:
    run = read_json(folder.pretrain / "run.json")
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    return f"Made by `kindiff demo` on {run['hardware']['processor']}, {run['hardware']['cores']} cores; {versions}."
