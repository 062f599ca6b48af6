"""Weights of the feature networks: where they lie, that they are the right ones, and how they are loaded."""

from __future__ import annotations

import shutil
import tempfile
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

from kindiff.checkpoint import sha256 as file_sha256
from kindiff.errors import BadFileError
from kindiff.runtime import cache_folder

if TYPE_CHECKING:
    import torch

DOWNLOAD_TIMEOUT = 60.0
"""Seconds without an answer after which a download is given up."""


def checked(path: Path, sha256: str) -> Path:
    """path itself when its hash is sha256; BadFileError names both hashes when it is not."""
    if not path.is_file():
        raise FileNotFoundError(f"weights file {path} does not exist.")
    found = file_sha256(path)
    if found != sha256:
        raise BadFileError(
            f"weights file {path} has SHA-256 {found[:16]}..., but {sha256[:16]}... is expected: it is "
            "truncated or another file; download it again."
        )
    return path


def download(url: str, sha256: str, name: str) -> Path:
    """The file `name` in the cache, fetched from url once; its hash is checked each time it is asked for.

    Raises OSError when it cannot be fetched and BadFileError when its hash is wrong (nothing is kept then).
    """
    target = cache_folder() / "weights" / name
    if target.is_file():
        return checked(target, sha256)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        part = Path(folder) / name
        try:
            with (
                urllib.request.urlopen(url, timeout=DOWNLOAD_TIMEOUT) as source,
                part.open("wb") as file,
            ):
                shutil.copyfileobj(source, file)
        except (urllib.error.URLError, TimeoutError) as error:
            reason = getattr(error, "reason", error)
            raise OSError(
                f"{url} cannot be downloaded ({reason}); download it elsewhere and give its path as weights."
            ) from None
        checked(part, sha256).replace(target)
    return target


def load_state(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a .pth file (weights_only: nothing in it is run); BadFileError for any other file."""
    import torch

    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"weights file {path} does not exist.") from None
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError, ... for a bad file
        raise BadFileError(f"weights file {path} cannot be read: {str(error)[:100]!r}.") from None
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise BadFileError(f"weights file {path} holds no state dict (names and tensors).")
    return state


def load_into(module: torch.nn.Module, state: dict[str, torch.Tensor], path: Path) -> None:
    """Strict load: every tensor of the module, no other; BadFileError names the first that does not fit.

    Batch-norm step counters (`num_batches_tracked`) are the one exception: some published files lack them.
    """
    own = {name: value.shape for name, value in module.state_dict().items() if not _is_counter(name)}
    given = {name: value.shape for name, value in state.items() if not _is_counter(name)}
    for name, shape in own.items():
        if name not in given:
            raise BadFileError(f"weights file {path} lacks the tensor {name!r}: it is of another network.")
        if given[name] != shape:
            raise BadFileError(
                f"weights file {path}: {name!r} has shape {tuple(given[name])}, expected {tuple(shape)}."
            )
    for name in given:
        if name not in own:
            raise BadFileError(f"weights file {path} has an extra tensor {name!r}: it is of another network.")
    module.load_state_dict({name: state[name] for name in own}, strict=False)


def _is_counter(name: str) -> bool:
    return name.endswith("num_batches_tracked")
