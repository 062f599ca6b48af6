"""One class out of a thousand: what is read and held while it is extracted, and the time to its first image.

    python benchmarks/parts_on_disk.py

Writes a components directory of DiT-S/2 with 1,000 classes (random values; about 0.4 GB) under --work, and measures in
fresh processes. Bytes read are counted twice. From the disk: the process's own count (/proc/self/io, read_bytes)
with every file of the directory put out of the system's cache before; zero where the file system keeps no such count.
Asked for: bytes that went through read calls, and the whole length of each file of the directory that is mapped into
memory. Peak memory is the growth of the resident set (VmHWM, pages of mapped files included), after the same was done
once with a tiny directory, to the finished files. Both stand beside the size of what is written. Linux only.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

LAYERS = ("factored", "dense", "merged")


@dataclass(frozen=True, kw_only=True)
class Args:
    out: Path = Path("benchmarks/results/parts-on-disk.json")
    """Where the figures go."""
    work: Path = Path("runs/parts-on-disk")
    """Where the parts are written, and kept for the next call."""
    preset: str = "DiT-S/2"
    """Backbone."""
    classes: int = 1000
    """Classes of the directory."""
    learngene_rank: int = 96
    """N_G."""
    tailor_rank: int = 1
    """N_T."""
    repeats: int = 3
    """Fresh processes of each measurement; the median counts."""


def write_parts(target: Path, preset: str, classes: int, learngene_rank: int, tailor_rank: int) -> None:
    """A components directory of random parts, one tailor at a time in memory."""
    import torch

    from kindiff import checkpoint
    from kindiff.classes import ClassSet
    from kindiff.components import Components, decompose, factorize, save_components
    from kindiff.config import DiTConfig, KindConfig
    from kindiff.models import DiT

    config = DiTConfig.preset(preset, num_classes=1)
    names = [f"class_{i:04d}" for i in range(classes)]
    kind = KindConfig(learngene_rank=learngene_rank, tailor_rank=tailor_rank, init="per-factor")
    one = decompose(factorize(DiT(config, classes=ClassSet((names[0],))), kind))
    generator = torch.Generator().manual_seed(0)
    for tensor in one.learngenes.values():
        tensor += 0.02 * torch.randn(tensor.shape, generator=generator)
    save_components(Components(one.config, one.targets, one.learngenes, one.tailors), target)
    description = checkpoint.read_json(target / "config.json")
    for name in names[1:]:
        tensors = {
            key: torch.randn(t.shape, generator=generator) / t.shape[-1]
            for key, t in one.tailors[names[0]].items()
        }
        metadata = {
            "class": name, "learngenes": description["learngenes"], "sha256": checkpoint.hash_tensors(tensors),
        }  # fmt: skip
        checkpoint.write_tensors(target / "tailors" / f"{name}.safetensors", tensors, metadata)
    description["model"]["num_classes"] = classes
    checkpoint.write_json(target / "config.json", description | {"classes": names})


def main(args: Args) -> None:
    from kindiff import runtime
    from kindiff.checkpoint import write_json

    parts = (
        args.work / f"{args.preset.replace('/', '-')}-{args.classes}-{args.learngene_rank}-{args.tailor_rank}"
    )
    if not (parts / "written").exists():
        shutil.rmtree(parts, ignore_errors=True)
        write_parts(parts, args.preset, args.classes, args.learngene_rank, args.tailor_rank)
        (parts / "written").touch()
    if not (args.work / "tiny").exists():
        write_parts(args.work / "tiny", "DiT-T/4", 2, 4, 1)
    rows = [
        _measure(parts, args.work / "one", f"class_{args.classes // 2:04d}", what, args.repeats)
        for what in (*LAYERS, "image")
    ]
    facts = {
        "versions": runtime.versions(), "hardware": runtime.hardware(), "preset": args.preset, "classes": args.classes,
        "learngene_rank": args.learngene_rank, "tailor_rank": args.tailor_rank,
        "directory_bytes": sum(p.stat().st_size for p in parts.rglob("*.safetensors")), "rows": rows,
    }  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.out, facts)
    print(table(facts))


def table(facts: dict[str, Any]) -> str:
    """The figures as the table of docs/performance.md."""
    lines = [
        "| layers | output MB | asked for / output | from disk / output | peak memory / output |",
        "|---|---|---|---|---|",
    ]
    for row in facts["rows"]:
        if row["what"] == "image":
            lines.append(
                f"\nFirst image: {row['seconds_to_first_image']:.1f} s from the start of the process."
            )
            continue
        size = row["output_bytes"]
        shares = [row[key] / size for key in ("asked_bytes", "disk_bytes", "peak_bytes")]
        lines.append(f"| {row['what']} | {size / 1e6:.1f} | " + " | ".join(f"{s:.3f}" for s in shares) + " |")
    return "\n".join(lines)


def _measure(parts: Path, out: Path, name: str, what: str, repeats: int) -> dict[str, Any]:
    found = []
    for _ in range(repeats):
        for path in parts.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        shutil.rmtree(out, ignore_errors=True)
        began = time.time()
        command = [sys.executable, __file__, "--child", str(parts), str(out), name, what, str(began)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found.append(json.loads(done.stdout.splitlines()[-1]))
    median = {key: sorted(f[key] for f in found)[len(found) // 2] for key in found[0]}
    return {"what": what, **median}


def child(parts: Path, out: Path, name: str, what: str, began: float) -> None:
    """One measurement in this process; prints its figures as JSON."""
    from kindiff.components import load_components
    from kindiff.config import SampleConfig
    from kindiff.pipeline import DiTPipeline

    if what == "image":
        model = load_components(parts, [name]).recombine(take_over=True)
        image = DiTPipeline(model).sample([0], SampleConfig(steps=20, device="cpu"))
        assert image.any()
        print(json.dumps({"seconds_to_first_image": time.time() - began}))
        return
    tiny = out.with_name("tiny")
    DiTPipeline(load_components(tiny, ["class_0001"]).recombine(layers=what, take_over=True)).save_pretrained(
        out.with_name("warm")
    )  # what is imported late, or made once, is no cost of the directory's size
    io, memory = _io(), _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
    model = load_components(parts, [name]).recombine(layers=what, take_over=True)  # type: ignore[arg-type]
    DiTPipeline(model).save_pretrained(out)
    after = _io()
    mapped = set(
        re.findall(rf" ({re.escape(str(parts.resolve()))}/.*)$", Path("/proc/self/maps").read_text(), re.M)
    )
    facts = {
        "asked_bytes": after["rchar"] - io["rchar"] + sum(Path(path).stat().st_size for path in mapped),
        "disk_bytes": after["read_bytes"] - io["read_bytes"],
        "peak_bytes": _resident("VmHWM") - memory,
        "output_bytes": sum(path.stat().st_size for path in out.rglob("*") if path.is_file()),
    }  # fmt: skip
    print(json.dumps(facts))


def _io() -> dict[str, int]:
    lines = Path("/proc/self/io").read_text().splitlines()
    return {key: int(value) for key, value in (line.split(": ") for line in lines)}


def _resident(field: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        parts, out, name, what, began = sys.argv[2:]
        child(Path(parts), Path(out), name, what, float(began))
    else:
        main(tyro.cli(Args))
