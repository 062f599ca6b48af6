"""The demo: one pre-training run, taken apart, put together smaller, taught new classes, and looked at."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kindiff.components import decompose, load_components, save_components
from kindiff.config import (
    BackboneConfig,
    DataConfig,
    KindConfig,
    PretrainConfig,
    SampleConfig,
    TrainConfig,
    TransferConfig,
)
from kindiff.pipeline import DiTPipeline
from kindiff.progress import say
from kindiff.study.demo_page import DemoFolder, demo_page
from kindiff.train import pretrain, transfer


@dataclass(frozen=True)
class Demo:
    """Sizes of a demo."""

    pretrain: PretrainConfig
    transfer: TransferConfig
    sample: SampleConfig
    one: str
    """The class of the single-class model."""
    four: tuple[str, ...]
    """The classes of the model at half the learngene rank."""
    strip: int
    """Images in a strip of the page."""


DEMOS = {
    "standard": Demo(
        pretrain=PretrainConfig(
            model=BackboneConfig(width=192, depth=6, heads=3, patch=4),
            kind=KindConfig(learngene_rank=64, tailor_rank=2, init="svd"),
            train=TrainConfig(steps=2000, batch=64, lr=2e-3, save_every=100),
        ),
        transfer=TransferConfig(
            data=DataConfig(source="avatars:novel", per_class=50),
            rank=2,
            train=TrainConfig(steps=500, batch=64, lr=4e-3, save_every=100, ema=0.99),
        ),
        sample=SampleConfig(steps=20, guidance=1.5, precision="auto", batch=128),
        one="voxel-art",
        four=("critters", "pixel-art", "landscape", "lorelei"),
        strip=4,
    ),
    "smoke": Demo(
        pretrain=PretrainConfig(
            data=DataConfig(size=16, per_class=8),
            model=BackboneConfig(preset="DiT-T/4"),
            kind=KindConfig(learngene_rank=16, tailor_rank=1),
            train=TrainConfig(steps=30, batch=16, save_every=10, log_every=5),
        ),
        transfer=TransferConfig(
            data=DataConfig(source="avatars:novel", size=16, per_class=4),
            rank=1,
            train=TrainConfig(steps=20, batch=16, save_every=10, log_every=5),
        ),
        sample=SampleConfig(steps=2, batch=128),
        one="voxel-art",
        four=("critters", "pixel-art", "landscape", "lorelei"),
        strip=2,
    ),
}


def run_demo(out: Path, demo: Demo) -> Path:
    """Run what is missing below `out`; returns the page. Interrupted, the same call goes on where it was."""
    folder = DemoFolder(out)
    say(f"1/6  pre-training on {demo.pretrain.data.source}")
    full = pretrain(demo.pretrain, folder.pretrain)

    say("2/6  taking it apart: learngenes and a tailor for each class")
    if not folder.parts.exists():
        save_components(decompose(full.model), folder.parts)

    say(f"3/6  putting models together: {demo.one} alone; four classes at half the learngene rank")
    if not folder.one.exists():
        small = load_components(folder.parts, [demo.one]).recombine()
        DiTPipeline(small).save_pretrained(folder.one)
    if not folder.four.exists():
        parts = load_components(folder.parts, demo.four)
        halved = parts.recombine(learngene_rank=parts.learngene_rank // 2)
        DiTPipeline(halved).save_pretrained(folder.four)

    few = demo.transfer.data.per_class
    say(f"4/6  teaching new classes from {few} images each: learngenes frozen, fresh tailors")
    transfer(folder.parts, demo.transfer, folder.transfer)

    say("5/6  taking the new tailors apart too")
    if not folder.novel_parts.exists():
        novel = decompose(DiTPipeline.from_pretrained(folder.transfer / "model").model)
        save_components(novel, folder.novel_parts)

    say("6/6  sampling from all of them")
    demo_page(folder, demo.pretrain, demo.transfer, demo.sample, strip=demo.strip)
    return folder.page
