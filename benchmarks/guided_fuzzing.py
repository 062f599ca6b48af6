"""Fuzzing guided by coverage: what kindiff reads from strangers, a million inputs.

    python benchmarks/guided_fuzzing.py                    all of it; run it again to go on where it stopped
    python benchmarks/guided_fuzzing.py --inputs 3000 --targets recipe.toml hierarchy.tsv --out fuzz.json

Needs the extra [fuzz]: atheris, i.e. libFuzzer for Python. kindiff and tomllib are instrumented; half of the mutations
are those of benchmarks/fuzzing.py, which know the format, half are libFuzzer's. Each batch is a process of its own and
goes on with what the batches before it kept. An input counts once it was mutated and read; what libFuzzer reads
again from its corpus does not. Memory is traced on one input in ten. Writes benchmarks/results/fuzzing.json as it goes.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import fuzzing
import tyro

from kindiff import runtime
from kindiff.checkpoint import write_json

BATCH = 40_000
MOST = (
    "kept_for_their_coverage",
    "longest_seconds",
    "most_traced_bytes_above_twice_the_file",
    "resident_growth_mib",
)


@dataclass(frozen=True, kw_only=True)
class Args:
    inputs: int = 1_000_000
    """Inputs over all targets."""
    targets: tuple[str, ...] = ()
    """Files (of benchmarks/fuzzing.py); none means all."""
    out: Path = Path("benchmarks/results/fuzzing.json")
    """Where the figures go; inputs that are counted there are not run again."""
    work: Path = Path("runs/fuzzing")
    """Where the seeds and what was found are kept."""


def main(args: Args) -> int:
    facts: dict[str, Any] = json.loads(args.out.read_text()) if args.out.is_file() else {"targets": {}}
    facts |= {
        "versions": runtime.versions() | {"atheris": metadata.version("atheris")},
        "hardware": runtime.hardware(), "margin_bytes": fuzzing.MARGIN, "seconds_allowed": fuzzing.SECONDS,
    }  # fmt: skip
    seeds = args.work / "seeds"
    if not (seeds / "done").exists():
        fuzzing.make_seeds(seeds)
    chosen = [t for t in fuzzing.targets() if not args.targets or t.file in args.targets]
    weight = sum(t.weight for t in chosen)
    for target in chosen:
        so_far = facts["targets"].setdefault(target.file, {"inputs": 0, "batches": 0, "faults": []})
        while so_far["inputs"] < (wanted := -(-args.inputs * target.weight // weight)):
            count = min(BATCH, wanted - so_far["inputs"])
            found = batch_in_child(args.work, target.file, so_far["batches"] + 1, count)
            found_any = found["inputs"] > 0
            _add(so_far, found)
            facts["inputs"] = sum(t["inputs"] for t in facts["targets"].values())
            facts["faults"] = sum(len(t["faults"]) for t in facts["targets"].values())
            write_json(args.out, facts)
            if not found_any:
                break
        print(f"{target.file}: {so_far['inputs']} inputs, {len(so_far['faults'])} faults", file=sys.stderr)
    print(table(facts))
    return 1 if facts["faults"] else 0


def table(facts: dict[str, Any]) -> str:
    """The figures as the table of docs/reliability.md."""
    lines = [
        "| file | inputs | different | kept for new code | faults | longest s | traced | bytes above twice the file |"
    ]
    lines.append("|---" * 8 + "|")
    for name, t in sorted(facts["targets"].items()):
        lines.append(
            f"| {name} | {t['inputs']:,} | {t['different_inputs']:,} | {t['kept_for_their_coverage']:,} | "
            f"{len(t['faults'])} | {t['longest_seconds']:.3f} | {t['traced']:,} | "
            f"{t['most_traced_bytes_above_twice_the_file']:,} |"
        )
    return "\n".join([*lines, f"\n{facts['inputs']:,} inputs, {facts['faults']} faults."])


def _add(so_far: dict[str, Any], found: dict[str, Any]) -> None:
    so_far["batches"] += 1
    so_far["faults"] += found.pop("faults")
    for name, value in found.items():
        so_far[name] = max(so_far.get(name, 0), value) if name in MOST else so_far.get(name, 0) + value


def batch_in_child(work: Path, file: str, number: int, count: int) -> dict[str, Any]:
    """A batch in a process of its own; a process that dies is a fault with the input that it read last."""
    place = work / f"place-{os.getpid()}"
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(work / "seeds", place)
    script = Path(__file__).with_name("guided_batch.py")
    command = [
        sys.executable,
        script,
        place,
        work / "corpus" / file.replace("/", "-"),
        file,
        str(number),
        str(count),
    ]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    answer = place / "answer.json"
    if answer.is_file():
        found: dict[str, Any] = json.loads(answer.read_text())
    else:
        last = (place / file).read_bytes()[:600]
        fault = f"{file}: the process ended with {done.returncode}: {done.stderr[-600:]} <- {last!r}"
        found = {"inputs": 0, "faults": [fault]}
    shutil.rmtree(place)
    return found


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args)))
