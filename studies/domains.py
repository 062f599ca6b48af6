"""The large domain shifts of the studies as image folders: `python studies/domains.py runs/domains`.

silhouettes    10 animals, 28 px grey (package animal-mnist, MIT): pip install --no-deps animal-mnist==0.4
scripts        10 scripts, no glyph twice (Debian's fonts-noto-core, OFL-1.1; package fonttools)
photo-patches  10 photographs, random crops of each (package scikit-image; see its data folder for each photo's terms)

350 images of 32 px a class, the same on each run; the SHA-256 of each set is printed and checked. Sets whose source is
not installed are left out and named.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import pickle
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIZE = 32
PER_CLASS = 350
FONTS = Path("/usr/share/fonts/truetype/noto")
SCRIPTS = (
    "AnatolianHieroglyphs", "Arabic", "Bamum", "CanadianAboriginal", "Cuneiform", "EgyptianHieroglyphs", "Ethiopic",
    "Nushu", "SignWriting", "Yi",
)  # fmt: skip
PHOTOS = (
    "brick.png", "chelsea.png", "coffee.png", "coins.png", "grass.png", "hubble_deep_field.jpg", "ihc.png", "moon.png",
    "page.png", "retina.jpg",
)  # fmt: skip
CROP = 64

Images = Iterator[tuple[str, Image.Image]]
"""(class, image), PER_CLASS of each class."""


class OnlyArrays(pickle.Unpickler):
    """Reads pickled NumPy arrays and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in {
            ("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct"),
            ("numpy", "ndarray"), ("numpy", "dtype"),
        }:  # fmt: skip
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)
        raise pickle.UnpicklingError(f"{module}.{name} is no array; the file is not used.")


def package(name: str) -> Path:
    """The folder of an installed package, which is not imported."""
    found = importlib.util.find_spec(name)
    if found is None or not found.submodule_search_locations:
        raise FileNotFoundError(f"the package {name} is not installed")
    return Path(found.submodule_search_locations[0])


def silhouettes() -> Images:
    folder = package("animal_mnist") / "data" / "Animal_MNIST"
    arrays = []
    for what in ("data", "label"):
        with gzip.open(folder / f"animal_{what}_version_3.gz") as file:
            arrays.append(np.asarray(OnlyArrays(file).load()))
    pixels, labels = arrays
    for label in np.unique(labels):
        for one in pixels[labels == label][:PER_CLASS]:
            grey = Image.fromarray(one.reshape(28, 28).astype(np.uint8))
            yield f"animal-{label}", grey.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def scripts() -> Images:
    from fontTools.ttLib import TTFont

    for script in SCRIPTS:
        path = FONTS / f"NotoSans{script}-Regular.ttf"
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not there (Debian: fonts-noto-core)")
        letters = [
            chr(code)
            for code in sorted(TTFont(path).getBestCmap())
            if code > 0x2FF and chr(code).isprintable()
        ]
        random.Random(script).shuffle(letters)
        font, count = ImageFont.truetype(str(path), 4 * SIZE), 0
        for letter in letters:
            left, top, right, bottom = font.getbbox(letter)
            side = max(right - left, bottom - top)
            if side == 0 or count == PER_CLASS:
                continue
            canvas = Image.new("L", (round(side * 1.2),) * 2, 255)
            at = ((canvas.width - left - right) / 2, (canvas.height - top - bottom) / 2)
            ImageDraw.Draw(canvas).text(at, letter, font=font, fill=0)
            count += 1
            yield script, canvas.resize((SIZE, SIZE), Image.Resampling.LANCZOS)
        if count < PER_CLASS:
            raise ValueError(f"{script} has {count} glyphs, {PER_CLASS} are wanted")


def photo_patches() -> Images:
    folder = package("skimage") / "data"
    for name in PHOTOS:
        photo = Image.open(folder / name).convert("RGB")
        draw = random.Random(name)
        for _ in range(PER_CLASS):
            x, y = draw.randrange(photo.width - CROP + 1), draw.randrange(photo.height - CROP + 1)
            yield (
                name.split(".")[0],
                photo.crop((x, y, x + CROP, y + CROP)).resize((SIZE, SIZE), Image.Resampling.BOX),
            )


def write(images: Images, folder: Path) -> str:
    """Write a set as one folder a class; returns the SHA-256 of its pixels."""
    digest, counts = hashlib.sha256(), dict[str, int]()
    for name, image in images:
        number = counts[name] = counts.get(name, -1) + 1
        (folder / name).mkdir(parents=True, exist_ok=True)
        rgb = image.convert("RGB")
        digest.update(rgb.tobytes())
        rgb.save(folder / name / f"{number:04d}.png")
    if set(counts.values()) != {PER_CLASS - 1}:
        raise ValueError(f"{folder.name}: a class has not {PER_CLASS} images: {counts}")
    return digest.hexdigest()


SETS: dict[str, tuple[Callable[[], Images], str]] = {
    "silhouettes": (silhouettes, "af92881d7052abbd29ac1b22960da07a23214f777f0b167c7546f3c1355cbd1e"),
    "scripts": (scripts, "f5b58cc89e5f05d6173bfe51f0842bc9a681a668025b5775cc8b90bb7f4104c8"),
    "photo-patches": (photo_patches, "d5af9c28683a0ffbd533f89183052cc9a2a8ca24c862552242c75aad5f31ce98"),
}
"""Each set and the SHA-256 of its pixels."""


def main(out: Path) -> int:
    missing = 0
    for name, (images, known) in SETS.items():
        try:
            found = write(images(), out / name)
        except FileNotFoundError as error:
            print(f"{name}: left out, {error}", file=sys.stderr)
            missing += 1
            continue
        print(f"{name}: {found}")
        if found != known:
            print(
                f"{name}: other pixels than on the reference machine; not comparable to the bit",
                file=sys.stderr,
            )
    return 1 if missing else 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python studies/domains.py OUT")
    sys.exit(main(Path(sys.argv[1])))
