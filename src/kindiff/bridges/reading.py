"""Reading other projects' weight files without running anything in them, and naming what does not fit.

A checkpoint is read into a mapping of names to tensors, memory-mapped where the file allows it.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kindiff import checkpoint
from kindiff.classes import ClassSet, shorten
from kindiff.config import DiTConfig
from kindiff.errors import BadFileError, UsageError
from kindiff.models.dit import DiT
from kindiff.models.layers import position_table

INNER = ("ema", "model", "state_dict")
"""Where a training checkpoint keeps its weights; the first that is there is taken."""

LAYOUTS = {
    "released": ("blocks.0.attn.qkv.weight", "the published DiT files' (fused attn.qkv)"),
    "diffusers": ("transformer_blocks.0.attn1.to_q.weight", "diffusers' (separate to_q, to_k, to_v)"),
    "kindiff": ("blocks.0.q.weight", "kindiff's (separate q, k, v)"),
}
"""A tensor that tells a layout, and what to call it."""
_MIXED = {
    r"blocks\.\d+\.attn\.(to_)?(q|q_proj|query)\.weight": "separate q, k and v, where the published layout has one "
    "fused attn.qkv",
    r"transformer_blocks\.\d+\.attn1?\.(to_)?qkv\.weight": "one fused to_qkv, where diffusers' layout has separate "
    "to_q, to_k and to_v (unfuse_qkv_projections() before saving)",
    r"blocks\.\d+\.q\.(u|sigma|v)": "components, where dense matrices are wanted (kindiff recombine --layers merged)",
}
"""Names that tell a mixture of layouts, and what to say of it."""


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a .pt, .pth or .bin file through torch's weights-only reader.

    A training checkpoint's `ema`, else `model`, else `state_dict` is taken; a leading `module.` is dropped.
    FileNotFoundError, or BadFileError for a damaged file, one with code in it, or one without tensors.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist.")
    if path.suffix == ".safetensors":
        return checkpoint.read_tensors(path)
    state = _load(path)
    for name in INNER:
        if isinstance(state, Mapping) and isinstance(state.get(name), Mapping):
            state = state[name]
            break
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()) or not state:
        raise BadFileError(
            f"{path} holds no state dict (names with tensors), nor one under {', '.join(INNER)}."
        )
    return {str(name).removeprefix("module."): tensor for name, tensor in state.items()}


def _load(path: Path) -> Any:
    try:
        try:
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except RuntimeError as error:
            if "mmap can only be used" not in str(error):
                raise
            return torch.load(path, map_location="cpu", weights_only=True)  # written before torch 1.6
    except pickle.UnpicklingError as error:
        if "nsupported" in str(error):
            found = re.search(r"(?:GLOBAL|class|global:?) (?:`)?([\w.]+)", str(error))
            raise BadFileError(
                f"{path} is refused: beside tensors it holds Python objects"
                f"{f' ({found.group(1)})' if found else ''}, and loading those would run code from the file. Where "
                "you trust it, save its state dict alone."
            ) from None
        raise BadFileError(f"{path} is no torch checkpoint; it is damaged or of another kind.") from None
    except (RuntimeError, EOFError, ValueError, KeyError, AttributeError) as error:
        fault = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise BadFileError(f"{path} is damaged or truncated ({fault}); fetch it again.") from None


def check_layout(where: str, tensors: Mapping[str, Tensor], layout: str) -> None:
    """BadFileError that names the mix-up when the tensors are plainly of another layout."""
    tell, _ = LAYOUTS[layout]
    if tell in tensors:
        return
    for other, (name, what) in LAYOUTS.items():
        if other != layout and name in tensors:
            raise BadFileError(
                f"{where} is in another layout: {what}, not {LAYOUTS[layout][1]}; use --from {other}."
            )
    for pattern, what in _MIXED.items():
        if any(re.fullmatch(pattern, name) for name in tensors):
            raise BadFileError(f"{where} has {what}.")


def check_shapes(where: str, tensors: Mapping[str, Tensor], wanted: Mapping[str, tuple[int, ...]]) -> None:
    """BadFileError unless the tensors have exactly the wanted names and shapes and are floating point."""
    missing = sorted(wanted.keys() - tensors.keys(), key=_natural)
    extra = sorted(tensors.keys() - wanted.keys(), key=_natural)
    if missing or extra:
        faults = [f"lacks {len(missing)} tensors: {shorten(missing, 4)}"] if missing else []
        faults += [f"has {len(extra)} unknown ones: {shorten(extra, 4)}"] if extra else []
        raise BadFileError(f"{where} does not fit its layout: it {'; it '.join(faults)}.")
    for name, shape in wanted.items():
        found = tensors[name]
        if tuple(found.shape) != shape:
            raise BadFileError(f"{where}: {name} has the shape {tuple(found.shape)}; {shape} is wanted.")
        if not found.is_floating_point():
            raise BadFileError(f"{where}: {name} is {found.dtype}; weights are floating point.")


def check_classes(where: str, count: int, classes: ClassSet | None) -> None:
    """UsageError when names are given for another number of classes than a checkpoint has."""
    if classes is not None and len(classes) != count:
        raise UsageError(
            f"{where} has {count} classes (and the null row) and {len(classes)} are named; give {count} names."
        )


def shape_of(where: str, tensors: Mapping[str, Tensor], name: str, dimensions: int) -> tuple[int, ...]:
    """The shape of a tensor that must be there."""
    if name not in tensors:
        raise BadFileError(f"{where} lacks {name!r}; it is no DiT, or its names were changed.")
    if tensors[name].ndim != dimensions:
        raise BadFileError(f"{where}: {name} has the shape {tuple(tensors[name].shape)}; it is no DiT's.")
    return tuple(tensors[name].shape)


def depth_of(where: str, tensors: Mapping[str, Tensor], prefix: str) -> int:
    """One more than the highest block number; BadFileError for one that the tensors cannot fill."""
    numbers = [int(m.group(1)) for name in tensors if (m := re.match(rf"{prefix}\.(\d+)\.", name))]
    depth = 1 + max(numbers, default=-1)
    if depth > len(tensors):
        raise BadFileError(f"{where} names block {depth - 1} and has {len(tensors)} tensors; it is damaged.")
    return depth


def filled(config: DiTConfig, classes: ClassSet | None, tensors: Mapping[str, Tensor]) -> DiT:
    """A dense model that takes these tensors (kindiff's names) over as float32, without a second copy of them."""
    with torch.device("meta"):
        model = DiT(config, classes=classes)
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
    model.positions_TD = position_table(config.width, config.input_size // config.patch)
    return model.requires_grad_(True)


def dense_state(model: DiT) -> dict[str, Tensor]:
    """The tensors of a dense model; UsageError for one made of components."""
    if model.structure is not None:
        raise UsageError(
            "the model is made of components and other layouts have dense matrices only; merge one class first "
            "(recombine with layers merged)."
        )
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
