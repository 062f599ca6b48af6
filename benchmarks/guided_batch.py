"""A batch of benchmarks/guided_fuzzing.py, in a process of its own: kindiff must be imported under instrumentation."""

from __future__ import annotations

import json
import os
import sys
import tracemalloc
from pathlib import Path

import atheris
import numpy as np

with atheris.instrument_imports(include=["kindiff", "tomllib"]):
    import fuzzing

    fuzzing.targets()

TRACED = 10
"""Memory is traced on one input of so many."""


def main(place: Path, corpus: Path, file: str, number: int, count: int) -> None:
    """`count` inputs on the seeds at `place`, then answer.json there; never returns."""
    target = next(t for t in fuzzing.targets() if t.file == file)
    with atheris.instrument_imports(include=["kindiff", "tomllib"]):
        target.read(place / file)  # what is imported late is imported now
    corpus.mkdir(parents=True, exist_ok=True)
    (corpus / "seed").write_bytes((place / file).read_bytes())
    watch, seen = fuzzing.Watch(place), set()
    mutated = False

    def mutate(content: bytes, longest: int, seed: int) -> bytes:
        nonlocal mutated
        mutated = True
        random = np.random.default_rng(seed)
        if random.random() < 0.5:
            try:
                return fuzzing.mutate(content, target.form, random, blind=0.1)[:longest]
            except (ValueError, IndexError, RecursionError):
                pass  # not of its form any more
        return atheris.Mutate(content, longest)

    def read(content: bytes) -> None:
        nonlocal mutated
        if not mutated:
            return _again(target, place / file, content)
        mutated = False
        traced = len(seen) % TRACED == 0
        watch.read(target, content, traced=traced)
        if traced:
            tracemalloc.stop()
        seen.add(hash(content))
        if watch.facts["inputs"][file] == count:
            facts = watch.end()
            facts |= {"inputs": count, "different_inputs": len(seen)}
            facts["kept_for_their_coverage"] = len(list(corpus.iterdir()))
            facts.pop("kinds", None)
            (place / "answer.json").write_text(json.dumps(facts))
            os._exit(0)

    options = [
        f"-seed={number}",
        "-max_len=65536",
        "-len_control=0",
        "-mutate_depth=2",
        "-use_value_profile=1",
    ]
    options += ["-timeout=20"]
    atheris.Setup([sys.argv[0], *options, str(corpus)], read, custom_mutator=mutate)
    atheris.Fuzz()


def _again(target: fuzzing.Target, path: Path, content: bytes) -> None:
    """An input that was counted before, or the seed: read for its coverage alone."""
    path.write_bytes(content)
    try:
        target.read(path)
    except Exception:
        return


if __name__ == "__main__":
    place, corpus, file, number, count = sys.argv[1:]
    main(Path(place), Path(corpus), file, int(number), int(count))
