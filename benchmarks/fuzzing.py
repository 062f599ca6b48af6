"""Mutated files for the fault campaign: structured and random changes to what kindiff reads from strangers.

A target is a small valid file, where it goes, and the function that reads it. Every mutation must end in a result or
in one of our errors, within a second and without memory that the file does not account for.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import struct
import time
import traceback
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kindiff import checkpoint
from kindiff.errors import BadFileError, UsageError

OURS = (UsageError, BadFileError, FileNotFoundError)
SECONDS = 1.0
MARGIN = 2**20
"""Bytes that Python's own objects (a parsed description, the modules of an empty model) may take beside the file."""
ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 2**31, 2**40, 2**63, 2**64, 10**30, -(2**63), 0.0, -0.5, 1e308, float("nan"),
    float("inf"), "", "x", "../../etc/passwd", "/etc/passwd", "a/b", ".", "..", "\0", "\ud800", "é" * 300, "x" * 5000,
    [], [[]], {}, {"a": 1}, [1] * 1000, list(range(50)), ["x"] * 300, "con", "q", "model", "F64", "U8", "F4", "BOOL",
)  # fmt: skip


@dataclass(frozen=True)
class Target:
    """One kind of file."""

    file: str
    """Its place below the folder of seeds."""
    form: str
    """json, header (of safetensors), toml or lines."""
    read: Callable[[Path], object]
    """Reads it as the package does."""
    weight: int
    """Share of the inputs."""


def targets() -> list[Target]:
    from kindiff.components import load_components, load_tailor
    from kindiff.config import PretrainConfig, TransferConfig, load_recipe
    from kindiff.data.check import read_quarantine
    from kindiff.data.groups import read_grouping
    from kindiff.data.hierarchy import read_hierarchy
    from kindiff.data.latents import LatentSet
    from kindiff.data.prepared import open_prepared
    from kindiff.evaluate.protocol import read_score
    from kindiff.evaluate.reference import load as load_reference
    from kindiff.models import DiT
    from kindiff.models.autoencoder import Autoencoder
    from kindiff.train.rollback import read_windows
    from kindiff.train.run import _read

    return [
        Target("model/config.json", "json", lambda p: DiT.from_pretrained(p.parent), 2),
        Target("model/model.safetensors", "header", checkpoint.read_tensors, 2),
        Target("headers.safetensors", "header", checkpoint.read_tensors, 14),
        Target("parts/config.json", "json", lambda p: load_components(p.parent), 2),
        Target("parts/tailors/owl.safetensors", "header", lambda p: load_tailor(p.parents[1], "owl"), 2),
        Target("codec/config.json", "json", lambda p: Autoencoder.from_pretrained(p.parent), 2),
        Target("images/manifest.json", "json", lambda p: open_prepared(p.parent), 6),
        Target("latents/manifest.json", "json", lambda p: LatentSet.open(p.parent), 6),
        Target("recipe.toml", "toml", lambda p: load_recipe(p, PretrainConfig), 20),
        Target("transfer.toml", "toml", lambda p: load_recipe(p, TransferConfig), 8),
        Target("hierarchy.tsv", "lines", read_hierarchy, 20),
        Target("groups.json", "json", lambda p: read_grouping(str(p)), 8),
        Target("quarantine.json", "json", read_quarantine, 8),
        Target("score.json", "json", read_score, 4),
        Target("reference/reference.json", "json", lambda p: load_reference(p.parent), 2),
        Target("rollbacks.json", "json", lambda p: read_windows(p.parent), 8),
        Target("step-00000005/state.json", "json", lambda p: _read(p.parent), 2),
    ]


def make_seeds(folder: Path) -> None:
    """Small valid files of every kind."""
    import torch

    from kindiff import DiT, DiTConfig, KindConfig, decompose, factorize, save_components
    from kindiff.classes import ClassSet
    from kindiff.config import AutoencoderConfig, DataConfig, EncodeConfig
    from kindiff.data.check import write_quarantine
    from kindiff.data.manifest import Skipped
    from kindiff.data.prepared import write_prepared
    from kindiff.evaluate.moments import Moments
    from kindiff.evaluate.protocol import ClassScore, Protocol, Score
    from kindiff.evaluate.reference import Reference, ReferenceInfo
    from kindiff.evaluate.reference import save as save_reference
    from kindiff.models.autoencoder import Autoencoder
    from kindiff.train.encoding import encode
    from kindiff.train.run import Run

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    config = DiTConfig(input_size=4, channels=3, num_classes=2, width=8, depth=1, heads=1, patch=2)
    dense = DiT(config, classes=ClassSet(("owl", "fox")))
    kind = factorize(dense, KindConfig(learngene_rank=2, tailor_rank=1))
    kind.save_pretrained(folder / "model")
    save_components(decompose(kind), folder / "parts")
    codec = Autoencoder(AutoencoderConfig(width=8))
    codec.save_pretrained(folder / "codec")
    pixels = np.zeros((3, 8, 8, 3), np.uint8)
    write_prepared(folder / "images", [("owl", pixels), ("fox", pixels)], size=8, source="zeros")
    images = DataConfig(source=str(folder / "images"), size=8)
    encode(EncodeConfig(data=images, autoencoder=str(folder / "codec"), workers=1), folder / "latents")
    recipe = "method = 'kind'\n[data]\nsource = 'x'\nclasses = ['owl', 'fox']\n[model]\nwidth = 64\n[kind]\n"
    recipe += "learngene_rank = 8\ntailor_rank = 2\ntargets = ['q']\n"
    recipe += "[train]\nsteps = 10\nlr = 1e-3\ntensorboard = false\n"
    (folder / "recipe.toml").write_text(recipe)
    transfer = "targets = ['q', 'v']\nrank = 2\nshare = 'class'\n[data]\nsource = 'x'\n[train]\nsteps = 10\n"
    (folder / "transfer.toml").write_text(transfer)
    kept = {"pool": np.zeros((2, 3), np.float32)}
    pool = Moments(2, np.zeros(3), np.eye(3))
    info = ReferenceInfo(
        name="x", images_sha256="0", features="y", features_sha256="0", resize="none", size=(8, 8), encoding="png",
        count=2, kept=2, classes=("owl", "fox"),
    )  # fmt: skip
    save_reference(
        Reference(info=info, moments={"pool": pool}, kept=kept, labels=np.array([0, 1])), folder / "reference"
    )
    protocol = Protocol(
        features="y", features_sha256="0", resize="none", count=2, size=(8, 8), encoding="png", classes=("owl", "fox"),
        reference="x", reference_sha256="0",
    )  # fmt: skip
    one = ClassScore(name="owl", count=1, kid=0.5, kid_error=0.1, accuracy=None)
    score = Score(
        protocol=protocol,
        distance_name="FD",
        distance=1.5,
        floor=0.5,
        floor_note="two halves",
        per_class=(one,),
    )
    checkpoint.write_json(folder / "score.json", score.to_json())
    lines = [
        "root\t\troot\t",
        "bird\t\tbird\troot",
        "owl\t0\towl\tbird",
        "fox\t1\tfox\troot",
        "bat\t2\tbat\tbird,root",
    ]
    (folder / "hierarchy.tsv").write_text("\n".join(lines) + "\n")
    groups = {
        "format": 1, "kind": "groups", "rule": "by hand", "splits": {"base": ["bird"]},
        "groups": [{"name": "bird", "node": "bird", "similarity": 0.5, "classes": ["owl", "fox"]}],
    }  # fmt: skip
    checkpoint.write_json(folder / "groups.json", groups)
    write_quarantine(folder / "quarantine.json", [Skipped("owl/1.png", "empty")], checked=2)
    window = {"first": 3, "end": 6, "cause": "nan", "capsule": "capsules/step-00000003"}
    checkpoint.write_json(folder / "rollbacks.json", {"windows": [window]})
    tensors = {group: {"x": torch.zeros(3)} for group in ("model", "ema", "optimiser", "log")}
    Run(folder / "run", {"seed": 1}).save(5, tensors)
    shutil.move(folder / "run" / "checkpoints" / "step-00000005", folder)
    kinds = (torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool)
    mixed = {f"x{i}": torch.zeros((2,) * i, dtype=kind) for i, kind in enumerate(kinds)}
    checkpoint.write_tensors(folder / "headers.safetensors", mixed, {"class": "owl"})
    for target in targets():
        target.read(folder / target.file)
    (folder / "done").write_text("")


def mutate(content: bytes, form: str, random: np.random.Generator, *, blind: float = 0.5) -> bytes:
    """One mutation: a share `blind` of them changes bytes, the others the structure."""
    if form == "header":
        length = int.from_bytes(content[:8], "little")
        if random.random() < 0.6 * blind:
            return _bytes(content[: 8 + length], random) + content[8 + length :]
        head = mutate(content[8 : 8 + length].strip(), "json", random, blind=blind)
        count = (
            len(head) if random.random() < 0.9 else (0, 1, 2**40, 2**63, 2**64 - 1)[int(random.integers(5))]
        )
        body = content[8 + length :]
        return struct.pack("<Q", count) + head + (body if random.random() < 0.8 else _bytes(body, random))
    if random.random() < blind:
        return _bytes(content, random)
    if form == "json":
        return _json(json.loads(content), random)
    return _lines(content, form, random)


def _bytes(content: bytes, random: np.random.Generator) -> bytes:
    changed = bytearray(content)
    for _ in range(int(random.integers(1, 5))):
        place = int(random.integers(0, len(changed) + 1))
        sort = random.integers(0, 5)
        if sort == 0 and place < len(changed):
            changed[place] ^= 1 << int(random.integers(0, 8))
        elif sort == 1:
            changed[place:place] = random.bytes(int(random.integers(1, 9)))
        elif sort == 2:
            del changed[place : place + int(random.integers(1, 40))]
        elif sort == 3:
            end = place + int(random.integers(1, 60))
            changed[place:place] = changed[place:end]
        else:
            del changed[place:]
    return bytes(changed)


def _json(value: Any, random: np.random.Generator) -> bytes:
    for _ in range(int(random.integers(1, 4))):
        places = list(_places(value))
        if not places:
            break
        owner, key = places[int(random.integers(len(places)))]
        sort = random.integers(0, 5)
        if sort == 0:
            del owner[key]
        elif sort == 1 and isinstance(owner, dict):
            owner[str(random.choice(["extra", "format", "kind", "", "__metadata__"]))] = _odd(random)
        elif sort == 2:
            other, name = places[int(random.integers(len(places)))]
            owner[key] = json.loads(json.dumps(other[name]))
        elif sort == 3 and isinstance(owner[key], int | float) and owner[key] is not True:
            owner[key] = owner[key] * int(random.choice([-1, 2, 1000, 2**40])) + int(random.integers(-2, 3))
        else:
            owner[key] = _odd(random)
    text = json.dumps(value)
    if random.random() < 0.05:
        text = text.replace("{", '{"format": 1, ', 1)  # a key twice
    if random.random() < 0.01:
        text = "[" * 5000 + text
    return text.encode("utf-8", "surrogatepass")


def _odd(random: np.random.Generator) -> Any:
    return json.loads(json.dumps(ODD[int(random.integers(len(ODD)))]))


def _places(value: Any) -> Any:
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])


def _lines(content: bytes, form: str, random: np.random.Generator) -> bytes:
    lines = content.decode().splitlines()
    joint = "\t" if form == "lines" else " = "
    for _ in range(int(random.integers(1, 4))):
        i, j = (int(x) for x in random.integers(0, len(lines), 2))
        sort, fields = random.integers(0, 4), lines[i].split(joint)
        if sort == 0:
            lines.insert(j, lines[i])
        elif sort == 1:
            lines[i] = lines[j]
        elif sort == 2:
            fields[int(random.integers(len(fields)))] = str(_odd(random))
            lines[i] = joint.join(fields)
        else:
            others = lines[j].split(joint)
            fields[int(random.integers(len(fields)))] = others[int(random.integers(len(others)))]
            lines[i] = joint.join(fields)
    return "\n".join(lines).encode("utf-8", "surrogatepass")


class _TooLongError(BaseException):
    pass


def _alarm(signum: int, frame: object) -> None:
    raise _TooLongError(f"more than {SECONDS} s of processor time")


class Watch:
    """Reads inputs of targets and keeps the facts: what was refused, faults, the longest time, the most memory.

    Time is the process's own (user and system), so that other work on the machine is no fault of an input.
    """

    def __init__(self, seeds: Path) -> None:
        self.seeds = seeds
        self.facts: dict[str, Any] = {
            "inputs": {}, "refused": 0, "faults": [], "longest_seconds": 0.0, "traced": 0,
            "most_traced_bytes_above_twice_the_file": 0,
        }  # fmt: skip
        self._resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        signal.signal(signal.SIGPROF, _alarm)

    def read(self, target: Target, content: bytes, *, traced: bool) -> None:
        """One input: a result or one of our errors, in time, without memory above twice the file and MARGIN."""
        facts, path = self.facts, self.seeds / target.file
        path.write_bytes(content)
        before = 0
        if traced:
            if not tracemalloc.is_tracing():
                tracemalloc.start()
            before = tracemalloc.get_traced_memory()[0]
            tracemalloc.reset_peak()
        began = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        fault = ""
        try:
            target.read(path)
        except OURS as error:
            facts["refused"] += 1
            fault = f"several lines: {error}" if "\n" in str(error) else ""
        except BaseException as error:
            fault = f"{type(error).__name__} at {_place(error)}: {error}"
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        facts["longest_seconds"] = max(facts["longest_seconds"], time.process_time() - began)
        if traced:
            above = tracemalloc.get_traced_memory()[1] - before - 2 * len(content)
            facts["traced"] += 1
            name = "most_traced_bytes_above_twice_the_file"
            facts[name] = max(facts[name], above)
            if above > MARGIN and not fault:
                fault = f"memory: {above} bytes above twice the file"
        facts["inputs"][target.file] = facts["inputs"].get(target.file, 0) + 1
        if fault:
            _note(facts, target, content, fault)

    def end(self) -> dict[str, Any]:
        """The facts, complete."""
        if tracemalloc.is_tracing():
            tracemalloc.stop()
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - self._resident
        return self.facts | {"resident_growth_mib": grown / 1024}


def _place(error: BaseException) -> str:
    """File and line of ours where an error came from."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "kindiff" in f.filename]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"


def batch(seeds: Path, number: int, count: int) -> dict[str, Any]:
    """`count` structured and random inputs of batch `number`, a function of both; memory is traced on 1 in 100."""
    random = np.random.default_rng([7, number])
    some = targets()
    weights = np.array([t.weight for t in some], float)
    whole = {t.file: (seeds / t.file).read_bytes() for t in some}
    for t in some:
        t.read(seeds / t.file)  # imports and caches are no allocation of an input
    watch = Watch(seeds)
    for i in range(count):
        target = some[int(random.choice(len(some), p=weights / weights.sum()))]
        watch.read(target, mutate(whole[target.file], target.form, random), traced=i % 100 == 0)
        if i % 100 == 0:
            tracemalloc.stop()
        (seeds / target.file).write_bytes(whole[target.file])
    return watch.end()


def _note(facts: dict[str, Any], target: Target, content: bytes, what: str) -> None:
    kind = f"{target.file}: {what.partition(': ')[0]}"
    if len(facts["faults"]) < 20 and kind not in facts.setdefault("kinds", []):
        facts["kinds"].append(kind)
        facts["faults"].append(f"{target.file}: {what[:300]} <- {content[:600]!r}")


def batch_in_child(seeds: Path, number: int, count: int, counts: dict[str, Any]) -> str:
    """A batch in a process of its own, on a copy of the seeds; adds to the counts, returns the faults."""
    place = seeds.with_name(f"seeds-{os.getpid()}")
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(seeds, place)
    answer = place / "answer.json"
    pid = os.fork()
    if not pid:
        try:
            answer.write_text(json.dumps(batch(place, number, count)))
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code:
        shutil.rmtree(place)
        return f"the process ended with {code}"
    facts = json.loads(answer.read_text())
    shutil.rmtree(place)
    counts["inputs"] = counts.get("inputs", 0) + sum(facts["inputs"].values())
    by_file = counts.setdefault("inputs_by_file", {})
    for name, number_of in facts["inputs"].items():
        by_file[name] = by_file.get(name, 0) + number_of
    for name in ("refused", "traced"):
        counts[name] = counts.get(name, 0) + facts[name]
    for name in ("longest_seconds", "most_traced_bytes_above_twice_the_file", "resident_growth_mib"):
        counts[name] = max(counts.get(name, 0), facts[name])
    return "; ".join(facts["faults"])
