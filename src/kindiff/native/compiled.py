"""The kernels of the C++ files beside this one, compiled by this machine's own C++ compiler when they are first wanted.

Kept in the cache folder by what they were made of, some seconds' work once a machine. Without a compiler, or where it
cannot make them, there are none, and who would call them does the same by torch's operations.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from kindiff import runtime

SOURCES = sorted(Path(__file__).parent.glob("*.cpp"))
HEADERS = sorted(Path(__file__).parent.glob("*.hpp"))
FLAGS = [
    "-std=c++17",
    "-O3",
    "-march=native",
    "-fno-math-errno",
    "-fno-exceptions",
    "-fno-rtti",
    "-fPIC",
    "-fopenmp",
]
ARGUMENTS = {
    "multiply": "pipiippipppiiiiiii",
    "multiply_turned": "pipippp" + "iii",
    "across": "ppppippiiiiii",
    "add": "ppippiiiii",
    "forward": "pppppppppiiiiiiiii",
    "backward": "ppppppppppp" + "i" * 10,
    "norm": "pppippiiif",
    "norm_back": "pppippppiiii",
    "residual": "ppippiii",
    "residual_back": "ppipppiiii",
    "attention_scratch": "iii",
    "attention": "ppppppiiiif",
    "attention_back": "ppppppppp" + "iiiif",
    "gelu": "ppi",
    "gelu_back": "pppi",
}
"""Of each kernel, which there is for each dtype: p a pointer or none, i an integer, f a float."""
OTHERS = {"adam_rows": "ppppppppiiffff"}
"""Those that there are in fp32 alone."""
TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_long, "f": ctypes.c_float}
SWITCH = "KINDIFF_NATIVE"
"""Set to 0, this variable of the environment does without the kernels; flags in it are the compiler's too."""


def kernels() -> ctypes.CDLL | None:
    """The loaded kernels, or None."""
    return found()[0]


@functools.cache
def found() -> tuple[ctypes.CDLL | None, str]:
    """The loaded kernels, or None; and where they are, or why there are none."""
    if os.environ.get(SWITCH) == "0":
        return None, f"{SWITCH}=0"
    compilers = filter(None, map(shutil.which, (os.environ.get("CXX") or "c++", "g++")))
    why = "no C++ compiler"
    for compiler in {os.path.realpath(path): str(Path(path).absolute()) for path in compilers}.values():
        try:
            path = runtime.cache_folder() / "native" / f"{_made_of(compiler)}.so"
            if not path.exists():
                _compile(compiler, path)
            return _loaded(path), str(path)
        except (OSError, RuntimeError, AttributeError, subprocess.SubprocessError) as error:
            said = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
            lines = said.strip().splitlines() or [str(error)]
            why = f"{compiler} does not make them: {next((line for line in lines if 'error' in line), lines[-1])}"
            if isinstance(error, subprocess.TimeoutExpired):
                break
    return None, why


def _flags() -> list[str]:
    return [*FLAGS, *(flag for flag in os.environ.get(SWITCH, "").split() if flag.startswith("-"))]


def _loaded(path: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(path))
    typed = {
        f"{name}_{dtype}": kinds for name, kinds in ARGUMENTS.items() for dtype in ("float32", "bfloat16")
    }
    for name, kinds in (typed | OTHERS).items():
        kernel = getattr(loaded, name)
        kernel.argtypes, kernel.restype = [TYPES[kind] for kind in kinds], ctypes.c_long
    return loaded


def _made_of(compiler: str) -> str:
    """A name for the source, the compiler and the processor together."""
    version = _said([compiler, "--version"], timeout=20).encode()
    parts = [
        *(file.read_bytes() for file in (*HEADERS, *SOURCES)),
        version,
        " ".join(_flags()).encode(),
        platform.machine().encode(),
    ]
    parts += [runtime.cpu_info(field).encode() for field in ("model name", "flags", "Features")]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _compile(compiler: str, path: Path) -> None:
    """Make the library; it appears whole or not at all. OpenMP's functions are to be torch's own, so that both share
    threads: what was compiled for it is linked without it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        objects = [f"{source.stem}.o" for source in SOURCES]
        for command in (
            [compiler, *_flags(), "-c", *map(str, SOURCES)],
            [compiler, "-shared", *objects, "-o", path.name],
        ):
            _said(command, timeout=120, cwd=folder)
        (Path(folder) / path.name).replace(path)


def _said(command: list[str], *, timeout: int, cwd: str | None = None) -> str:
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, errors="replace", check=True, timeout=timeout
    ).stdout
