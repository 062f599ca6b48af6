"""Where things run: the device, the cache folder, and what a result must record of its machine."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterator
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from kindiff.config import EncodeConfig, Precision, SampleConfig, TrainConfig
from kindiff.errors import UsageError
from kindiff.parallel import local_rank

if TYPE_CHECKING:
    import torch

Settled = TypeVar("Settled", TrainConfig, SampleConfig, EncodeConfig)
PACKAGES = ("kindiff", "torch", "numpy", "scipy", "safetensors", "pillow")


def cache_folder() -> Path:
    """$KINDIFF_CACHE, else $XDG_CACHE_HOME/kindiff, else ~/.cache/kindiff, as an absolute path."""
    if folder := os.environ.get("KINDIFF_CACHE"):
        return Path(folder).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute() / "kindiff"


def device_of(name: str) -> torch.device:
    """The torch device for `auto` (a GPU when there is one), `cpu`, `cuda`, `cuda:1`; each local rank has a GPU."""
    import torch

    rank = local_rank()
    gpu = "cuda" if rank is None else f"cuda:{rank}"
    if name == "auto":
        return torch.device(gpu if torch.cuda.is_available() else "cpu")
    if name == "cuda":
        name = gpu
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"device {name!r} is unknown; use auto, cpu or cuda.") from None
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"device {name!r} is not one that kindiff runs on; use auto, cpu or cuda.")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"device {name!r} is asked for but this torch sees no GPU; use cpu or auto.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        last = torch.cuda.device_count() - 1
        raise UsageError(
            f"device {name!r} is asked for but this torch sees none after cuda:{last}; use that or auto."
        )
    return device


def precision_on(device: torch.device, name: Precision) -> Precision:
    """bf16 or fp32; for `auto` bf16 where the device multiplies it in hardware, else fp32.

    Elsewhere bf16 is right but slow: six to eight times as slow as fp32 on a CPU with AVX2 alone (docs/performance.md).
    """
    import torch

    if name != "auto":
        return name
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = cpu_has("amx_bf16") or cpu_has("avx512_bf16")
    return "bf16" if fast else "fp32"


def cpu_has(feature: str) -> bool:
    """Whether torch says that this CPU has a feature, by torch's name for it; False where this torch cannot say."""
    import torch

    return hasattr(torch.cpu, "get_capabilities") and bool(torch.cpu.get_capabilities().get(feature))


def settled(config: Settled) -> Settled:
    """The config with its precision as it is on its device: what determines a result is written down like this."""
    return replace(config, precision=precision_on(device_of(config.device), config.precision))


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """Around forward passes: matrix products in bf16 where `precision` is or, on this device, means that."""
    import torch

    return torch.autocast(device.type, torch.bfloat16, enabled=precision_on(device, precision) == "bf16")


@contextlib.contextmanager
def exact_convolutions() -> Iterator[None]:
    """Around float32 convolutions that are to be float32 on a GPU too, whose cuDNN else rounds factors to TF32."""
    import torch

    convolutions = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = convolutions.fp32_precision
    convolutions.fp32_precision = "ieee"
    try:
        yield
    finally:
        convolutions.fp32_precision = before


def versions() -> dict[str, str]:
    """Versions of what computes a result."""
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in PACKAGES}


def hardware() -> dict[str, Any]:
    """Processor, cores, memory and GPU, as a result records them; `vectors`: the instructions that torch uses there."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "processor": cpu_info("model name") or platform.processor() or "unknown",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "gpu": gpu,
        "system": f"{platform.system()} {platform.machine()}",
    }


def cpu_info(field: str) -> str:
    """What Linux says of the first processor under a name such as "flags"; empty where it says nothing."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(field)), "")
