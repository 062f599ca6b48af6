"""Records: one JSON file a cell, with all that is needed to read it alone; tables and figures are made of them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from kindiff.checkpoint import read_json, write_json
from kindiff.errors import BadFileError
from kindiff.evaluate.protocol import Score
from kindiff.study.config import Cell

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What a record keeps of a score."""

    distance_name: str
    """FD (Lite0), FID."""
    distance: float
    """Fréchet distance; lower is better."""
    floor: float | None
    """The same between two sets of real images."""
    accuracy: float | None
    """Share of samples that a probe takes for the class they were asked to be."""
    real_accuracy: float | None
    """The same of real images."""
    precision: float | None
    recall: float | None
    kid: float | None
    count: int
    """Samples."""

    @staticmethod
    def of(score: Score) -> Figures:
        return Figures(
            distance_name=score.distance_name,
            distance=score.distance,
            floor=score.floor,
            accuracy=score.accuracy,
            real_accuracy=score.real_accuracy,
            precision=score.precision,
            recall=score.recall,
            kid=score.kid,
            count=score.protocol.count,
        )


@dataclass(frozen=True, kw_only=True)
class Record:
    """One cell's result."""

    study: str
    task: str
    method: str
    lr: float
    seed: int
    label: str
    """What tables call the method."""
    family: str
    budget: str
    base: str
    config: dict[str, Any]
    """The whole recipe of the cell."""
    trainable: int
    """Parameters that train, class embeddings included."""
    parameters: int
    """Parameters of the finished model."""
    gmacs: float
    """Multiply-accumulates (1e9) of one forward pass of one image of the finished model."""
    steps: int
    batch: int
    train_seconds: float
    """Time of the training, on the hardware of the provenance, beside whatever else ran; not a benchmark."""
    final_loss: float | None
    """Training loss over the last logged steps."""
    failed: str = ""
    """Why there is no score: the training gave numbers that are not finite."""
    validation: Figures | None = None
    """Against the validation images; chooses the learning rate, so the first seed's alone is asked for."""
    test: Figures | None = None
    """Against the test images; only cells at a chosen rate have it."""
    provenance: dict[str, Any]
    """Versions, hardware, hashes of data, base and references, protocol of the scores."""
    model: str = ""
    """Where the model was, relative to the working folder of the study."""

    @property
    def cell(self) -> Cell:
        return Cell(task=self.task, method=self.method, lr=self.lr, seed=self.seed)

    def with_test(self, score: Score) -> Record:
        """The record, scored."""
        return replace(self, test=Figures.of(score))


def write_record(folder: Path, record: Record) -> None:
    """Into the study's results, replacing an older one of the cell."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / f"{record.cell.name}.json", {"format": FORMAT, **asdict(record)})


def read_records(folder: Path, name: str = "*") -> list[Record]:
    """The records of a study's results folder (or of the cell of that name alone), ordered by name.

    BadFileError names a file that is none.
    """
    return [_read(path) for path in sorted(Path(folder).glob(f"{name}.json"))]


def _read(path: Path) -> Record:
    values = read_json(path)
    if values.pop("format", None) != FORMAT:
        raise BadFileError(f"{path} is no record of format {FORMAT}; delete it, its cell is run again.")
    try:
        for part in ("validation", "test"):
            if values[part] is not None:
                values[part] = Figures(**values[part])
        return Record(**values)
    except (KeyError, TypeError) as error:
        raise BadFileError(
            f"{path} is no whole record ({error}); delete it, its cell is run again."
        ) from None
