"""Whole models side by side in one run: training steps and guided sampling steps of ours and of others.

    python benchmarks/models.py steps       forward, backward, clipping, optimiser: DiT-S/2 and DiT-B/2
    python benchmarks/models.py sampling    one guided step of 8 images: recombined models, merged, others
    python benchmarks/models.py gpu         steps of DiT-B/2 and L/2 at batch 64 to 256, bf16, compiled and
                                            recorded as CUDA graphs (needs a GPU)
    python benchmarks/models.py profile     where the time of a step goes, operation by operation (compiled on a GPU)

Against our dense DiT: components (N_G = width / 4, N_T = 4, 150 classes), diffusers' DiTTransformer2DModel of the
same shape, our dense DiT with peft's LoRA beside its frozen weights (rank width / 8), and on DiT-S the rank mask of
speed.py.
Variants take turns; figures are medians of ratios within a round. Peak memory is of a process of its own on a CPU.
Results go to benchmarks/results/models-<part>.json.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from speed import RankMask, allowed, alternate, dtypes, model_pair, row, sampler, save
from torch import Tensor, nn

from kindiff import runtime
from kindiff.allocator import keep_memory
from kindiff.components import decompose
from kindiff.components.build import Structure
from kindiff.config import MATRICES, TrainConfig
from kindiff.data.batches import Batch
from kindiff.diffusion import loss_of
from kindiff.evaluate.cost import closed_macs
from kindiff.models import DiT
from kindiff.train.memory import DTYPES, activations
from kindiff.train.optimiser import Optimiser
from kindiff.train.step import Recorded, Step

CLASSES = 150
torch._dynamo.config.recompile_limit = 64  # all blocks of all variants count together


@dataclass(frozen=True, kw_only=True)
class Args:
    part: tyro.conf.Positional[Literal["steps", "sampling", "gpu", "profile", "peak"]]
    """What to measure (peak: the memory of one variant, used by steps)."""
    rounds: int = 6
    """Rounds; each runs every variant once."""
    batch: int = 8
    """Images a batch (256 tokens each)."""
    batches: tuple[int, ...] = (64, 128, 256)
    """Of gpu."""
    device: str = "auto"
    """auto, cpu or cuda."""
    compile: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Compile all variants (always on for gpu)."""
    model: str = ""
    """One model only: DiT-S, DiT-B, DiT-L."""
    variant: str = "kind"
    """Of peak."""
    variants: tuple[str, ...] = ("dense", "kind", "diffusers", "LoRA")
    """Of gpu and profile."""
    precision: Literal["", "fp32", "bf16"] = ""
    """One arithmetic only; of peak and profile bf16 unless said."""
    out: Path | None = None
    """Where the JSON goes."""


class Diffusers(nn.Module):
    """diffusers' DiT, called as ours is."""

    def __init__(self, dense: DiT) -> None:
        super().__init__()
        from diffusers import DiTTransformer2DModel

        config = dense.config
        self.inner = DiTTransformer2DModel(
            num_attention_heads=config.heads, attention_head_dim=config.width // config.heads,
            in_channels=config.channels, out_channels=config.out_channels, num_layers=config.depth,
            sample_size=config.input_size, patch_size=config.patch, num_embeds_ada_norm=config.num_classes,
        )  # fmt: skip

    def forward(self, x: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        return self.inner(x, timestep=t, class_labels=ids).sample


def lora(dense: DiT) -> nn.Module:
    """peft's LoRA on our dense DiT, unmerged: the weights are frozen, the adapters' products stand beside theirs."""
    from peft import LoraConfig, get_peft_model

    rank = dense.config.width // 8
    return get_peft_model(dense, LoraConfig(r=rank, lora_alpha=rank, target_modules=list(MATRICES)))


def masked(kind: DiT) -> DiT:
    for block in kind.blocks:
        for matrix in MATRICES:
            setattr(block, matrix, RankMask(getattr(block, matrix)))
    return kind


def make(name: str, variant: str) -> nn.Module:
    dense, kind = model_pair(name, CLASSES)
    return {
        "dense": lambda: dense, "kind": lambda: kind, "diffusers": lambda: Diffusers(dense),
        "LoRA": lambda: lora(dense), "rank mask": lambda: masked(kind),
    }[variant]()  # fmt: skip


def step_run(
    model: nn.Module,
    config: Any,
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    compiled: bool = False,
    recorded: bool = False,
) -> Callable[[], None]:
    """A whole training step: forward, backward, clipping, optimiser; of ours by training's own means."""
    model.to(device).train()
    if compiled:
        compile_blocks(model)
    loss = loss_of(config)
    x = torch.randn(batch, config.channels, config.input_size, config.input_size, device=device)
    noise, u = torch.randn_like(x), torch.rand(batch, device=device)
    ids_host = torch.arange(batch) % CLASSES
    ids = ids_host.to(device)
    if type(model) is DiT and not isinstance(model.blocks[0].q, RankMask):
        train = TrainConfig(
            lr=1e-5, batch=batch, precision="bf16" if dtype == torch.bfloat16 else "fp32", compile=compiled,
            record=recorded,
        )  # fmt: skip
        optimiser = Optimiser(model, train)
        work, slots = Step(model, optimiser, loss, train), optimiser.slots_on(ids_host)
        once = torch.unique(ids_host)

        def run() -> None:
            work.gradients(Batch(x, ids, ids, noise, u), slots)
            work.move(1.0, slots, once)

        return run
    trained = [p for p in model.parameters() if p.requires_grad]
    other = torch.optim.AdamW(trained, lr=1e-5, fused=True, capturable=device.type == "cuda")

    def plain() -> tuple[()]:
        other.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            value = loss(lambda a, t: model(a, t, ids), x, noise, u).mean()
        value.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        other.step()
        return ()

    return Recorded(plain, device) if recorded else plain


def compile_blocks(model: nn.Module) -> None:
    """As training does it: one graph a block, compiled once for all blocks of a model."""
    for name, blocks in model.named_modules():
        if name.rpartition(".")[2] in ("blocks", "transformer_blocks"):
            for block in blocks:
                block.compile(dynamic=False, fullgraph=True)


def steps(args: Args, device: torch.device) -> list[dict[str, Any]]:
    rows = []
    for name in (args.model,) if args.model else ("DiT-S", "DiT-B"):
        labels = ["dense", "kind", "diffusers", "LoRA"] + ["rank mask"] * (name == "DiT-S")
        models = {label: make(name, label) for label in labels}
        kind = models["kind"]
        for dtype in dtypes(args.precision):
            variants = {
                label: step_run(model, kind.config, args.batch, dtype, device, compiled=args.compile)
                for label, model in models.items()
            }
            seconds = alternate(variants, args.rounds, device)
            found = row(f"{name}/2 step", dtype, "train", seconds, allowed(kind, whole=True))
            found["parameters"] = {k: sum(p.numel() for p in m.parameters()) for k, m in models.items()}
            if device.type == "cpu":
                precision = "bf16" if dtype == torch.bfloat16 else "fp32"
                found["peak MiB"] = {
                    label: peak_of(name, label, precision, args.batch) for label in labels[:4]
                }
                print("   peak MiB", found["peak MiB"], flush=True)
            rows.append(found | {"compiled": args.compile})
    return rows


def peak_of(name: str, variant: str, precision: str, batch: int) -> float:
    """Peak resident memory, in MiB, of a process that takes two steps; the libraries' own share included."""
    command = [sys.executable, __file__, "peak", "--model", name, "--variant", variant, "--precision", precision,
               "--batch", str(batch), "--device", "cpu"]  # fmt: skip
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def peak(args: Args, device: torch.device) -> None:
    model = make(args.model, args.variant)
    config = model_pair(args.model, CLASSES, depth=1)[0].config
    dtype = DTYPES[args.precision or "bf16"]
    run = step_run(model, config, args.batch, dtype, device)
    run()
    run()
    status = Path("/proc/self/status").read_text()  # getrusage would count the parent's until exec
    print(int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1)) / 1024)


def sampling(args: Args, device: torch.device) -> list[dict[str, Any]]:
    """One guided step: the class and the null pass in one batch of twice the images.

    Not the first of a batch: weights are rounded and tailors gathered once for all of a sampler's steps.
    """
    rows = []
    for name in (args.model,) if args.model else ("DiT-S", "DiT-B"):
        dense, kind = model_pair(name, CLASSES)
        parts = decompose(kind)
        eight = parts.classes[: args.batch]
        models: dict[str, nn.Module] = {
            "dense": dense,
            "kind": parts.recombine(eight, layers="factored"),
            "kind, one class": parts.recombine(eight[:1], layers="factored"),
            "merged, one class": parts.recombine(eight[:1], layers="merged"),
            "whole, 150 classes": kind,
            "diffusers": Diffusers(dense),
            "LoRA": lora(model_pair(name, CLASSES)[0]),
        }
        for dtype in dtypes(args.precision):
            variants = {
                label: guided_run(model, kind.config, args.batch, device, args.compile)
                for label, model in models.items()
            }
            alone = guided_run(models["kind"], kind.config, args.batch, device, args.compile, shared=False)
            variants["kind, steps that share nothing"] = alone
            with sampler(dtype, device):
                seconds = alternate(variants, args.rounds, device)
            limit = allowed(models["kind"], whole=True)
            rows.append(
                row(f"{name}/2 sampling", dtype, "sample", seconds, limit) | {"compiled": args.compile}
            )
    return rows


def guided_run(
    model: nn.Module, config: Any, batch: int, device: torch.device, compiled: bool, *, shared: bool = True
) -> Callable[[], None]:
    model.to(device).eval().requires_grad_(True)  # autocast keeps rounded weights of no others
    if compiled:
        compile_blocks(model)
    x = torch.randn(2 * batch, config.channels, config.input_size, config.input_size, device=device)
    t = torch.full((2 * batch,), 500.0, device=device)
    own = len(model.classes) if isinstance(model, DiT) else CLASSES
    ids = torch.cat([torch.arange(batch) % own, torch.full((batch,), own)]).to(device)
    if not isinstance(model, DiT) or not shared:
        return lambda: model(x, t, ids)
    gating = model.gating(ids)
    return lambda: model(x, t, ids, gating=gating)


def gpu(args: Args, device: torch.device) -> list[dict[str, Any]]:
    """bf16, compiled, recorded; and the share of the time that the card's limits, measured here, account for."""
    assert device.type == "cuda", "this part needs a GPU"
    flops, bytes_ = card_limits(device)
    rows = []
    for name in (args.model,) if args.model else ("DiT-B", "DiT-L"):
        for batch in args.batches:
            models = {label: make(name, label) for label in args.variants}
            kind = models["kind"]
            variants = {
                label: step_run(
                    model, kind.config, batch, torch.bfloat16, device, compiled=True, recorded=True
                )
                for label, model in models.items()
            }
            if batch == min(args.batches):  # where the host is slower than the card
                variants |= {
                    f"{label}, not recorded": step_run(
                        models[label], kind.config, batch, torch.bfloat16, device, compiled=True
                    )
                    for label in ("dense", "kind")
                }
            found = row(
                f"{name}/2, batch {batch}", torch.bfloat16, "train", alternate(variants, args.rounds, device),
                allowed(kind, whole=True),
            )  # fmt: skip
            found["images a second"] = {k: batch / ms * 1e3 for k, ms in found["milliseconds"].items()}
            for label in ("dense", "kind"):
                structure = None if label == "dense" else Structure(**kind.structure)
                operations = 3 * 2 * batch * sum(closed_macs(kind.config, structure).values())
                moved = 2 * activations(
                    models[label], "bf16", batch, device
                )  # written once, read once, at least
                least = max(operations / flops, moved / bytes_)
                found[f"{label}: share of the card's limit"] = least / (found["milliseconds"][label] / 1e3)
            print(
                "   ",
                {k: v for k, v in found.items() if "share of" in k or k == "images a second"},
                flush=True,
            )
            rows.append(
                found
                | {"compiled": True, "recorded": True, "measured flop/s": flops, "measured bytes/s": bytes_}
            )
            save(
                "models-gpu", device, args.out, rows=rows, rounds=args.rounds
            )  # as it comes: it takes a while
            del models, variants
            torch.cuda.empty_cache()
    return rows


def profile(args: Args, device: torch.device) -> list[dict[str, Any]]:
    """The operations of a step that take longest by themselves, of one variant after the other."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    gpu_, rows = device.type == "cuda", []
    precision = args.precision or "bf16"
    for name in (args.model,) if args.model else ("DiT-S", "DiT-B"):
        for label in args.variants:
            model = make(name, label)
            config = model_pair(name, CLASSES, depth=1)[0].config
            run = step_run(model, config, args.batch, DTYPES[precision], device, compiled=gpu_)
            times: Counter[str] = Counter()
            calls: Counter[str] = Counter()
            for _ in range(args.rounds):
                run()  # compiles, makes the moments; then, puts the memory in order that the profiler broke up
                with profiled(activities=[ProfilerActivity.CUDA if gpu_ else ProfilerActivity.CPU]) as found:
                    run()
                    if gpu_:
                        torch.cuda.synchronize()
                for e in found.key_averages():
                    own = e.self_device_time_total if gpu_ else e.self_cpu_time_total
                    times[e.key] += own / 1e3 / args.rounds
                    calls[e.key] += e.count
                del found
            total, largest = sum(times.values()), times.most_common(40)
            print(f"{name}/2 {label}, {args.batch} images, {precision}: {total:.1f} ms a step")
            for key, time in largest:
                print(
                    f"    {time:8.2f} ms {time / total:6.1%} {calls[key] // args.rounds:5d} x  {key[:120]}",
                    flush=True,
                )
            rows.append({"what": f"{name}/2", "variant": label, "dtype": precision, "milliseconds": total}
                        | {"operations": dict(largest)})  # fmt: skip
    return rows


def card_limits(device: torch.device) -> tuple[float, float]:
    """bf16 operations a second of a large square product, and bytes a second of a copy."""
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    big = torch.empty(2**30, device=device, dtype=torch.uint8)
    other = torch.empty_like(big)
    seconds = alternate({"product": lambda: a @ b, "copy": lambda: other.copy_(big)}, 20, device)
    return 2 * 8192**3 / min(seconds["product"]), 2 * 2**30 / min(seconds["copy"])


def main(args: Args) -> None:
    keep_memory()
    device = runtime.device_of(args.device)
    if args.part == "peak":
        peak(args, device)
        return
    rows = {"steps": steps, "sampling": sampling, "gpu": gpu, "profile": profile}[args.part](args, device)
    name = f"models-{args.part}{'-compiled' if args.compile else ''}"
    save(name, device, args.out, rows=rows, batch=args.batch, rounds=args.rounds)


if __name__ == "__main__":
    main(tyro.cli(Args))
