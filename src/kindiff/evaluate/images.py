"""Where evaluated images come from: folders, .npz files, arrays. All give uint8 RGB and a hash.

Shapes: N images, B images of a batch, H/W height and width.
"""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

import numpy as np

from kindiff.checkpoint import sha256 as file_sha256
from kindiff.classes import ClassSet
from kindiff.data.decode import over_white
from kindiff.errors import BadFileError, UsageError

LOSSLESS = "lossless"
SUFFIXES = {".png": LOSSLESS, ".bmp": LOSSLESS, ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
IGNORED = {".json", ".txt", ".md", ".html"}
DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")


class Images(Protocol):
    """A set of images of one size, read in order, a batch at a time."""

    @property
    def name(self) -> str:
        """What a person calls it."""

    @property
    def sha256(self) -> str:
        """Hash of what it was made from."""

    @property
    def size(self) -> tuple[int, ...]:
        """Height and width in pixels."""

    @property
    def encoding(self) -> str:
        """What the pixels went through before they came here: lossless, jpeg, webp or mixed."""

    @property
    def labels(self) -> np.ndarray | None:
        """(N,) class ids, or None."""

    @property
    def classes(self) -> ClassSet | None:
        """Names of the classes, or None."""

    @property
    def class_order(self) -> bool:
        """Whether images of a class stand together."""

    def __len__(self) -> int:
        """N."""

    def read(self, start: int, stop: int) -> np.ndarray:
        """Images start .. stop-1 as uint8 (B, H, W, 3)."""


@dataclass(frozen=True, kw_only=True)
class ArrayImages:
    """Images that are in memory, or mapped into it."""

    name: str
    """What a person calls it."""
    array: np.ndarray
    """uint8 (N, H, W, 3)."""
    sha256: str
    """Hash of what it was made from."""
    labels: np.ndarray | None = None
    """(N,) class ids."""
    classes: ClassSet | None = None
    """Names of the classes."""
    encoding: str = LOSSLESS
    """What the pixels went through."""
    class_order: bool = True
    """Whether images of a class stand together."""
    rows: np.ndarray | None = None
    """(N,) places in the array of the images; None for all of it."""

    def __post_init__(self) -> None:
        if self.array.ndim != 4 or self.array.shape[-1] != 3 or self.array.dtype != np.uint8:
            raise UsageError(
                f"{self.name} has {self.array.dtype} images of shape {self.array.shape}; expected: uint8 "
                "(N, H, W, 3), RGB."
            )
        if len(self) == 0:
            raise UsageError(f"{self.name} has no images.")

    @property
    def size(self) -> tuple[int, int]:
        return self.array.shape[1], self.array.shape[2]

    def __len__(self) -> int:
        return len(self.array if self.rows is None else self.rows)

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.array[start:stop] if self.rows is None else self.array[self.rows[start:stop]]


class FolderImages:
    """Image files of a folder, as they are: nothing is scaled or cropped.

    If each file lies in a sub-folder, the sub-folders are the classes; else there are none. Files are read in
    the order of their paths. JSON, text, Markdown and HTML files and hidden ones are passed over. Raises
    UsageError for an empty folder, another file or images of several sizes, BadFileError for a broken image.
    """

    encoding: str
    class_order = True

    def __init__(self, folder: Path, *, classes: tuple[str, ...] = ()) -> None:
        self.name = str(folder)
        paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and not _hidden(path, folder)]
        self.paths = [path for path in paths if path.suffix.lower() not in IGNORED]
        for path in self.paths:
            if path.suffix.lower() not in SUFFIXES:
                raise UsageError(
                    f"{path} is no image file ({', '.join(SUFFIXES)}); move it out of the samples folder."
                )
        parents = {path.relative_to(folder).parts[0] for path in self.paths if path.parent != folder}
        self.classes: ClassSet | None = None
        self.labels: np.ndarray | None = None
        if parents and all(path.parent != folder for path in self.paths):
            self._use_classes(folder, ClassSet(tuple(sorted(parents))), classes)
        elif classes:
            raise UsageError(f"{folder} has no sub-folders, so classes {classes} cannot be picked from it.")
        if not self.paths:
            raise UsageError(f"{folder} has no images ({', '.join(SUFFIXES)}).")
        kinds = {SUFFIXES[path.suffix.lower()] for path in self.paths}
        self.encoding = kinds.pop() if len(kinds) == 1 else "mixed"
        self.size = self._decode(self.paths[0]).shape[:2]
        self.sha256 = self._hash(folder)

    def _use_classes(self, folder: Path, found: ClassSet, wanted: tuple[str, ...]) -> None:
        found.ids(wanted)  # an unknown class is an error that names the nearest
        self.classes = ClassSet(wanted) if wanted else found
        names = [path.relative_to(folder).parts[0] for path in self.paths]
        kept = [i for i, name in enumerate(names) if name in self.classes.names]
        self.paths = [self.paths[i] for i in kept]
        self.labels = np.array([self.classes.id(names[i]) for i in kept])

    def _hash(self, folder: Path) -> str:
        digest = hashlib.sha256()
        for path in self.paths:
            digest.update(f"{path.relative_to(folder).as_posix()}\0{file_sha256(path)}\n".encode())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, start: int, stop: int) -> np.ndarray:
        images = []
        for path in self.paths[start:stop]:
            image = self._decode(path)
            if image.shape[:2] != self.size:
                raise UsageError(
                    f"{path} is {image.shape[1]} x {image.shape[0]} pixels, {self.paths[0].name} is "
                    f"{self.size[1]} x {self.size[0]}; all images of a set must have one size."
                )
            images.append(image)
        return np.stack(images)

    @staticmethod
    def _decode(path: Path) -> np.ndarray:
        from PIL import Image

        try:
            with Image.open(path) as image:
                if image.mode in DEEP_MODES:
                    raise BadFileError(
                        f"{path} has more than 8 bits a channel ({image.mode}); convert it first."
                    )
                return np.asarray(over_white(image))
        except BadFileError:
            raise
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise BadFileError(
                f"{path} cannot be read as an image ({error}); remove or replace it."
            ) from None


def _hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, OSError)
"""What reading a damaged archive raises."""


class NpzImages:
    """Images of an .npz file in guided-diffusion's layout: `arr_0` uint8 (N, H, W, 3), labels `arr_1`.

    The file is streamed, not loaded: 50,000 images of 256 x 256 are 9.8 GB. Nothing in it is unpickled.
    Raises BadFileError for a damaged or foreign file.
    """

    encoding = LOSSLESS
    class_order = False
    classes: ClassSet | None = None

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self.path = path
        with open_npz(path) as archive:
            if "arr_0.npy" not in archive.namelist():
                raise BadFileError(
                    f"{path} has no images: the array arr_0 is missing ({archive.namelist()})."
                )
            self.labels = read_array(archive, path, "arr_1") if "arr_1.npy" in archive.namelist() else None
            with archive.open("arr_0.npy") as file:
                self.shape = _header(file, path)
        if self.shape[0] == 0:
            raise UsageError(f"{path} has no images: arr_0 is empty.")
        if self.labels is not None and self.labels.shape != self.shape[:1]:
            raise BadFileError(f"{path} has {self.shape[0]} images but labels of shape {self.labels.shape}.")
        self.size = self.shape[1:3]
        self.sha256 = file_sha256(path)
        self._file: IO[bytes] | None = None
        self._at = 0

    def __len__(self) -> int:
        return self.shape[0]

    def read(self, start: int, stop: int) -> np.ndarray:
        stop = min(stop, len(self))
        if self._file is None or start < self._at:
            self._file = open_npz(self.path).open("arr_0.npy")
            _header(self._file, self.path)
            self._at = 0
        while self._at < start:
            self._next()
        images = np.empty((stop - start, *self.shape[1:]), dtype=np.uint8)
        for image in images:
            image[:] = self._next()
        return images

    def _next(self) -> np.ndarray:
        assert self._file is not None
        row = int(np.prod(self.shape[1:]))
        try:
            data = self._file.read(row)
        except DAMAGE as error:
            raise BadFileError(f"{self.path} is damaged ({error}); fetch it again.") from None
        if len(data) != row:
            raise BadFileError(f"{self.path} is truncated: it ends inside image {self._at}.")
        self._at += 1
        return np.frombuffer(data, dtype=np.uint8).reshape(self.shape[1:])


def open_npz(path: Path) -> zipfile.ZipFile:
    """An .npz file as an archive; FileNotFoundError or BadFileError when it is none."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist.")
    try:
        return zipfile.ZipFile(path)
    except zipfile.BadZipFile:
        raise BadFileError(f"{path} is no .npz file, or a truncated one.") from None


def read_array(archive: zipfile.ZipFile, path: Path, name: str) -> np.ndarray:
    """One whole array of an .npz file; BadFileError for pickled or damaged contents."""
    try:
        with archive.open(f"{name}.npy") as file:
            return np.lib.format.read_array(file, allow_pickle=False)
    except (ValueError, *DAMAGE) as error:
        raise BadFileError(f"{path}: array {name} cannot be read ({error}).") from None


def _header(file: IO[bytes], path: Path) -> tuple[int, int, int, int]:
    try:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[
            version
        ]
        shape, fortran, dtype = read(file)
    except (ValueError, KeyError, *DAMAGE) as error:
        raise BadFileError(f"{path}: arr_0 has no readable header ({error}).") from None
    if dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3 or fortran:
        raise BadFileError(f"{path}: arr_0 is {dtype} {shape}; expected: uint8 (N, H, W, 3), C order, RGB.")
    return shape
