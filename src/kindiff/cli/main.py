"""The command line: a command is imported only when it is chosen, so `--help` does not wait for torch.

Exit codes: 0 done; 1 failure (a damaged file, a full disk, a loss that is not finite); 2 usage; 130 and 143 after
Ctrl-C and SIGTERM. Results go to stdout, progress and errors to stderr.
"""

from __future__ import annotations

import dataclasses
import errno
import importlib
import os
import sys
import traceback
from itertools import pairwise
from pathlib import Path
from typing import Any

from kindiff.allocator import keep_memory
from kindiff.classes import nearest
from kindiff.errors import UsageError
from kindiff.parallel import leave, place

COMMANDS = {
    "demo": "pre-train, decompose, recombine, transfer and sample on drawn avatars; ends with a page to look at",
    "encode": "turn images into latents, with a small autoencoder (trained first) or diffusers' AutoencoderKL",
    "data": "check a folder of images: what cannot be read or stands twice goes on a list and is left out",
    "pretrain": "pre-train a decomposable diffusion transformer on images",
    "decompose": "take a model apart: learngenes and one tailor file per class",
    "recombine": "put a smaller model together from parts",
    "transfer": "teach parts new classes by training only fresh tailors",
    "adapt": "teach a dense model new classes with a rival: LoRA and its kin, full fine-tuning, other learngenes",
    "sample": "draw images: a grid, or a folder",
    "study": "compare methods over tasks, learning rates and seeds; tables and figures of the results",
    "evaluate": "score samples against a reference: FD (Lite0) or FID, KID, precision, recall, class accuracy",
    "report": "write one page about a run or a study: who won, tables, figures, samples, components",
    "classes": "show a class hierarchy, merge similar classes into groups, deal them out to tasks",
    "convert": "read and write released DiT files, diffusers' transformer and pipeline folders",
    "push": "write a model card from the run and upload the model to the Hugging Face hub",
    "inspect": "show where a model's or parts directory's parameters, bytes and GMACs are",
    "replay": "run a step again that was not taken because a number was not finite",
    "env": "show versions and hardware",
}


def help_text() -> str:
    """The list of commands."""
    rows = "\n".join(f"  {name:<10} {what}" for name, what in COMMANDS.items())
    return (
        "usage: kindiff COMMAND [ARGUMENTS]\n\n"
        "KIND for diffusion transformers: one pre-training run, many models.\n\n"
        f"commands:\n{rows}\n\n"
        "`kindiff COMMAND --help` explains a command. Commands that train or sample take --config RECIPE.toml and\n"
        "overrides such as --train.steps 100. To resume an interrupted command, run it again."
    )


def main(argv: list[str]) -> int:
    """Run one command; returns the exit code."""
    if not argv or argv[0] in ("-h", "--help"):
        print(help_text())
        return 0 if argv else 2
    if argv[0] == "--version":
        from kindiff import __version__

        print(f"kindiff {__version__}")
        return 0
    name = argv[0]
    if name not in COMMANDS:
        return _fail(f"unknown command {name!r}{nearest(name, COMMANDS)}; `kindiff --help` lists them.", 2)
    try:
        module = importlib.import_module(f"kindiff.cli.{name}")
        module.run(parse(module.Args, argv[1:], prog=f"kindiff {name}"))
    except UsageError as error:
        return _fail(str(error), 2)
    except KeyboardInterrupt:
        return _fail("interrupted; to resume, run the same command again.", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        return _fail(_sentence(error), 1)
    except Exception as error:
        return _from_training(error)
    sys.stdout.flush()
    return 0


def parse(args_class: type, argv: list[str], *, prog: str) -> Any:
    """Arguments as the command's dataclass; `--config FILE` fills its `recipe` before the overrides."""
    import tyro

    from kindiff.config import load_recipe

    default = None
    path = _option(argv, "--config")
    if path is not None:
        hints = {f.name: f for f in dataclasses.fields(args_class)}
        if "recipe" not in hints:
            raise UsageError(f"{prog} takes no --config.")
        recipe_class: Any = hints["recipe"].default_factory
        required = {
            name: tyro.MISSING
            for name, f in hints.items()
            if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        }
        default = args_class(recipe=load_recipe(Path(path), recipe_class), **required)
    argv = _flags_spelled_out(args_class, argv)
    return tyro.cli(args_class, args=argv, default=default, prog=prog, config=(tyro.conf.FlagConversionOff,))


def _flags_spelled_out(args_class: type, argv: list[str]) -> list[str]:
    """`--json` as `--json True`: a command's own switches need no value, a recipe's settings do."""
    switches = {f"--{f.name.replace('_', '-')}" for f in dataclasses.fields(args_class) if f.default is False}
    return [
        part
        for word, after in pairwise([*argv, ""])
        for part in ([word, "True"] if word in switches and after not in ("True", "False") else [word])
    ]


def _option(argv: list[str], name: str) -> str | None:
    for i, word in enumerate(argv):
        if word.startswith(f"{name}="):
            return word.split("=", 1)[1]
        if word == name and i + 1 < len(argv):
            return argv[i + 1]
    return None


def _from_training(error: Exception) -> int:
    """Failures with types of their own; anything else is a bug and shows its traceback."""
    code = getattr(error, "exit_code", None)
    if code is not None:
        return _fail(str(error), code)
    if type(error).__name__ == "OutOfMemoryError":
        return _fail(
            "the device's memory is full; take a smaller batch, or in training --train.accumulate 2 or "
            "--train.recompute True (--dry-run says what a step needs).",
            1,
        )
    if isinstance(error, ImportError) and "pip install" in str(error):
        return _fail(str(error), 1)
    traceback.print_exc()
    return 1


def _sentence(error: OSError) -> str:
    if error.errno == errno.ENOSPC:
        return (
            "the disk is full; nothing half-written was left and earlier files are whole. Free some space and run "
            "the same command again."
        )
    if error.errno is not None and error.strerror:
        return f"{error.filename}: {error.strerror}." if error.filename else f"{error.strerror}."
    return str(error)


def _fail(sentence: str, code: int) -> int:
    rank = place()[0]
    print(f"kindiff{f' (rank {rank})' if rank else ''}: {sentence}", file=sys.stderr)
    return code


def entry() -> None:
    """The console script."""
    keep_memory()
    leave(main(sys.argv[1:]))


if __name__ == "__main__":
    entry()
