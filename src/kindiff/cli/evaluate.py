"""kindiff evaluate"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from kindiff.config import SampleConfig

if TYPE_CHECKING:
    from kindiff.evaluate.features import Features
    from kindiff.evaluate.protocol import Score
    from kindiff.parallel import Ranks

WORST = 10


@dataclass(frozen=True, kw_only=True)
class Args:
    """Score samples against real images; each score carries the protocol that it was made by.

    To resume an interrupted evaluation, run the same command again.
    """

    samples: tyro.conf.Positional[Path]
    """A folder of images (a sub-folder a class, or flat), an .npz file (arr_0), or a model directory, from which
    samples are drawn on the way."""
    reference: str = "avatars:base"
    """Real images: avatars:base, avatars:novel or avatars:all; a folder; an .npz file of guided-diffusion; a stored
    reference. Statistics are built once and kept in the cache."""
    features: Literal["lite0", "inception"] = "lite0"
    """lite0: FD (Lite0), needs no download. inception: FID, sFID and the inception score."""
    weights: Path | None = None
    """File of Inception weights; without it they are downloaded once. Its SHA-256 is checked."""
    classes: tuple[str, ...] = ()
    """Only these classes, of samples and reference both."""
    groups: str = ""
    """The reference's classes are merged into groups, as the model's were in training: imagenet, avatars or a file."""
    split: str = ""
    """Only the groups of this list, such as base or novel-10."""
    per_class: int = 0
    """Reference images of each class; 0 for all."""
    count: int = 0
    """Images that a model draws, the classes in turn; 0 for 50 of each class."""
    out: Path | None = None
    """Folder for the samples' features and score.json; without it, features are kept in the cache."""
    compare: Path | None = None
    """score.json of an earlier evaluation: print the difference, if the protocols are the same."""
    save_reference: Path | None = None
    """Folder to store the reference in."""
    feature_batch: int = 64
    """Images that the feature network sees at once; the score does not depend on it."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print a JSON object: scores and protocol."""
    config: Path | None = None
    """Recipe (TOML) of the sampling options below."""
    recipe: tyro.conf.OmitArgPrefixes[SampleConfig] = field(default_factory=SampleConfig)


def run(args: Args) -> None:
    """Evaluate and print; of several ranks the first one, with features that all computed."""
    from kindiff.parallel import joined

    with joined() as ranks:
        _run(args, ranks)


def _run(args: Args, ranks: Ranks) -> None:
    from kindiff.checkpoint import write_json
    from kindiff.errors import UsageError
    from kindiff.evaluate import reference as references
    from kindiff.evaluate.generated import GeneratedImages
    from kindiff.evaluate.protocol import read_score, same_protocol
    from kindiff.evaluate.run import UNKNOWN_SAMPLER, evaluate, protocol_of
    from kindiff.evaluate.sources import open_reference, open_samples
    from kindiff.evaluate.store import compute, digest, identity
    from kindiff.progress import say
    from kindiff.runtime import cache_folder

    if args.feature_batch < 1:
        raise UsageError(f"feature_batch is {args.feature_batch}; it must be at least 1.")
    earlier = read_score(args.compare) if args.compare else None
    features = _features(args)
    samples = ranks.in_turn(
        lambda: open_samples(args.samples, count=args.count, classes=args.classes, sampling=args.recipe)
    )
    with _progress("reference") as progress:
        reference = ranks.in_turn(
            lambda: open_reference(
                args.reference,
                features,
                cache_folder() / "references",
                size=samples.size,
                classes=args.classes,
                per_class=args.per_class,
                groups=args.groups,
                split=args.split,
                batch=args.feature_batch,
                progress=progress,
            )
        )
    if args.save_reference and ranks.first:
        references.save(reference, args.save_reference)
    sampler = samples.sampler if isinstance(samples, GeneratedImages) else UNKNOWN_SAMPLER
    if earlier:
        same_protocol(earlier.protocol, protocol_of(samples, reference, features, sampler))
    key = digest(identity(samples, features))[:16]
    work = args.out / "features" if args.out else cache_folder() / "evaluations" / key
    with _progress("samples") as progress, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # they are among the notes
        if ranks.count > 1:
            compute(samples, features, work, batch=args.feature_batch, progress=progress, ranks=ranks)
        if not ranks.first:
            return
        score = evaluate(
            samples,
            reference,
            features,
            work=work,
            sampler=sampler,
            batch=args.feature_batch,
            progress=progress,
        )
    if args.out:
        write_json(args.out / "score.json", score.to_json())
    for note in score.notes:
        say(f"note: {note}")
    print(json.dumps(score.to_json(), indent=1) if args.json else table(score))
    if earlier:
        say(
            f"{score.distance_name}: {earlier.distance:.3f} before, {score.distance - earlier.distance:+.3f} now"
        )


def table(score: Score) -> str:
    """The score for people."""
    protocol = score.protocol

    def row(name: str, value: float | None, more: str = "") -> list[str]:
        return [] if value is None else [f"{name:<18}{value:>12.4f}{'  ' + more if more else ''}".rstrip()]

    floor = "" if score.floor is None else f"real/real floor {score.floor:.4f}: "
    s_floor = "" if score.spatial_floor is None else f"real/real floor {score.spatial_floor:.4f}"
    real = "" if score.real_accuracy is None else f"real images: {score.real_accuracy:.4f}"
    lines = [
        *row(score.distance_name, score.distance, floor + score.floor_note),
        *row("sFID", score.spatial_distance, s_floor),
        *row("inception score", score.inception_score, f"± {score.inception_score_error or 0:.4f}"),
        *row("precision", score.precision),
        *row("recall", score.recall),
        *row("KID", score.kid, f"± {score.kid_error or 0:.4f}"),
        *row("class accuracy", score.accuracy, real),
    ]
    if score.per_class:
        worst = sorted(score.per_class, key=lambda one: -one.kid)[:WORST]
        lines += ["", f"{'class':<24}{'N':>6}{'KID':>10}{'±':>9}{'accuracy':>10}"]
        for one in worst:
            accuracy = "" if one.accuracy is None else f"{one.accuracy:>10.3f}"
            lines.append(f"{one.name[:23]:<24}{one.count:>6}{one.kid:>10.4f}{one.kid_error:>9.4f}{accuracy}")
        if len(score.per_class) > WORST:
            lines.append(f"the worst {WORST} of {len(score.per_class)} classes; --json has all")
    drawn = "" if protocol.sampler is None else (
        f", {protocol.sampler} in {protocol.steps} steps, guidance {protocol.guidance}, seed {protocol.seed}"
    )  # fmt: skip
    lines += [
        "",
        f"N = {protocol.count} of {protocol.size[1]} x {protocol.size[0]}, {protocol.encoding}{drawn}",
        f"features {protocol.features} {protocol.features_sha256[:12]}; {protocol.resize}",
        f"reference {protocol.reference} {protocol.reference_sha256[:12]}",
    ]
    return "\n".join(lines)


def _features(args: Args) -> Features:
    from kindiff.errors import UsageError
    from kindiff.runtime import device_of

    device = str(device_of(args.recipe.device))
    if args.features == "inception":
        from kindiff.evaluate.inception import InceptionFeatures

        return InceptionFeatures.load(args.weights, device=device)
    from kindiff.evaluate.lite0 import Lite0Features

    if args.weights:
        raise UsageError("weights are for the inception features; lite0 brings its own.")
    return Lite0Features.load(device=device)


@contextlib.contextmanager
def _progress(label: str) -> Iterator[Callable[[int, int], None]]:
    """Progress of one set of images on stderr, with the time left; what was there already does not count."""
    from kindiff.progress import Track

    with contextlib.ExitStack() as stack:
        tracks: list[Track] = []

        def update(done: int, total: int) -> None:
            if not tracks:
                track = Track(f"features of the {label}", total, unit="images", done=done)
                tracks.append(stack.enter_context(track))
            tracks[0].advance(done - tracks[0].done)

        yield update
