"""Compare the C++ preprocessing with Python's, bit by bit: check_preprocess.py PREPROCESS_LINES.

Hundreds of sizes, crops and filters; every kind of JPEG and PNG; truncated and damaged files, which both must refuse or
decode alike.
"""

from __future__ import annotations

import random
import struct
import subprocess
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL
from PIL import Image
from PIL.PngImagePlugin import PngInfo

ROOT = Path(__file__).parents[3]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import photos  # noqa: E402

from export_zoo.calibration.decode import UnreadableImageError  # noqa: E402
from export_zoo.calibration.preprocess import Preprocess, normalize, read_pixels  # noqa: E402

CROPS = [(224, 224), (32, 32), (96, 128), (299, 299), (225, 223)]
RESIZES = [256, 232, 32, 224, 300, 100, 17]
OTHER_LIBJPEG = 0.01
"""Share of damaged files that one version of libjpeg-turbo refuses or smooths unlike another.

Of a damaged progressive file, Debian's djpeg (2.1.5) gives other pixels than Pillow's libjpeg-turbo (3.2.0), too.
"""


@dataclass
class Case:
    path: Path
    resize: int = 48
    crop: tuple[int, int] = (40, 40)
    interpolation: str = "bilinear"
    mode: str = "RGB"
    crop_mode: str = "center"
    damaged: bool = False

    @property
    def preprocess(self) -> Preprocess:
        return Preprocess(
            resize_size=self.resize,
            crop_height=self.crop[0],
            crop_width=self.crop[1],
            interpolation=self.interpolation,
            mean=(0,) * self.channels,
            std=(1,) * self.channels,
            mode=self.mode,
            crop_mode=self.crop_mode,
            source="test",
        )

    @property
    def channels(self) -> int:
        return 1 if self.mode == "L" else 3

    def line(self) -> str:
        pillow = PIL.__version__.split(".")[0]
        crop = f"{self.resize} {self.crop[0]} {self.crop[1]}"
        return f"{self.path} {crop} {self.interpolation} {pillow} {self.channels} {self.crop_mode}\n"


def sizes(folder: Path, pictures: list[Image.Image], rng: random.Random) -> list[Case]:
    cases = []
    for index in range(400):
        width, height = rng.randint(1, 700), rng.randint(1, 700)
        if index % 10 < 2:
            width, height = rng.randint(1, 40), rng.randint(300, 1500)
        if index % 10 == 1:
            width, height = height, width
        path = folder / f"size-{index}.png"
        rng.choice(pictures).resize((width, height)).save(path, compress_level=1)
        interpolation = rng.choice(["bilinear", "bicubic"])
        mode, crop_mode = rng.choice(["RGB", "RGB", "L"]), rng.choice(["center", "center", "squash"])
        cases.append(Case(path, rng.choice(RESIZES), rng.choice(CROPS), interpolation, mode, crop_mode))
    return cases


def odd_exif() -> dict[str, bytes]:
    """Orientation 6 as a rare writer has it: in other types of number, twice, and out of line."""

    def tiff(kind: str, count: int, value: bytes, more: bytes = b"") -> bytes:
        number = {"long": 4, "signed byte": 6, "signed short": 8, "signed long": 9, "short": 3, "byte": 1}[
            kind
        ]
        entry = struct.pack("<HHI", 0x0112, number, count) + value.ljust(4, b"\0")
        return b"Exif\0\0II*\0\x08\0\0\0\x01\0" + entry + bytes(4) + more

    return {
        "long": tiff("long", 1, b"\6"),
        "byte": tiff("byte", 1, b"\6"),
        "signed-byte": tiff("signed byte", 1, b"\6"),
        "signed-short": tiff("signed short", 1, b"\6"),
        "signed-long": tiff("signed long", 1, b"\6"),
        "none": tiff("short", 0, b"\6"),
        "two": tiff("short", 2, b"\6\0\1"),
        "three": tiff("short", 3, b"\x1a", b"\6\0\1\0\1\0"),
        "three-cut": tiff("short", 3, b"\x1a", b"\6\0\1\0\1"),
    }


def kinds(folder: Path, pictures: list[Image.Image], rng: random.Random) -> list[Case]:
    paths = []

    def save(name: str, image: Image.Image, **options) -> None:
        paths.append(folder / name)
        image.save(paths[-1], **options)

    for index, picture in enumerate(pictures[:6]):
        image = picture.resize((rng.randint(60, 200), rng.randint(60, 200)))
        for quality in (5, 50, 95):
            for subsampling in ("4:4:4", "4:2:2", "4:2:0", "4:1:1"):
                for progressive in (False, True):
                    name = f"{index}-{quality}-{subsampling.replace(':', '')}-{progressive}.jpg"
                    save(name, image, quality=quality, subsampling=subsampling, progressive=progressive)
        save(f"{index}-gray.jpg", image.convert("L"))
        save(f"{index}-cmyk.jpg", image.convert("CMYK"))
        save(f"{index}-restart.jpg", image, restart_marker_rows=1)
        for orientation in range(10):
            exif = Image.Exif()
            exif[0x0112] = orientation
            save(f"{index}-turned{orientation}.jpg", image, exif=exif)
            save(f"{index}-turned{orientation}.png", image, exif=exif)
            text = PngInfo()
            profile = b"Exif\0\0" + exif.tobytes().removeprefix(b"Exif\0\0")
            text.add_text("Raw profile type exif", f"\nexif\n{len(profile):8}\n{profile.hex()}\n", zip=True)
            save(f"{index}-raw{orientation}.png", image, pnginfo=text)
        for name, exif in odd_exif().items():
            save(f"{index}-{name}.jpg", image, exif=exif)
            save(f"{index}-{name}.png", image, exif=exif)
        save(f"{index}-xmp.jpg", image, xmp=b'<x><rdf:Description tiff:Orientation="6"/></x>')
        save(f"{index}-xmp2.jpg", image, xmp=b"<x><tiff:Orientation>8</tiff:Orientation></x>")
        for mode in ("1", "L", "LA", "P", "RGBA", "RGB"):
            save(f"{index}-{mode}.png", image.convert(mode))
        deep = np.asarray(image.convert("L")).astype(np.uint16) * 257
        save(f"{index}-16.png", Image.fromarray(deep + rng.randint(0, 99)))
        save(f"{index}-clear.png", image.convert("P"), transparency=5)
        for bits in (1, 2, 4):
            save(f"{index}-palette{bits}.png", image.quantize(2**bits), bits=bits)
    return [*map(Case, paths), *(Case(path, mode="L") for path in paths[::3])]


def damage(folder: Path, rng: random.Random) -> list[Case]:
    cases = []
    for name in ("0-50-420-False.jpg", "0-50-420-True.jpg", "0-RGB.png", "0-P.png", "0-cmyk.jpg"):
        whole = (folder / name).read_bytes()
        for index in range(90):
            data = bytearray(whole)
            if index < 30:
                del data[rng.randint(0, len(data)) :]
            else:
                for _ in range(rng.randint(1, 4)):
                    data[rng.randrange(len(data))] = rng.randrange(256)
            path = folder / f"damaged-{index}-{name}"
            path.write_bytes(data)
            cases.append(Case(path, damaged=True))
        (folder / f"longer-{name}").write_bytes(whole + b"trailing garbage")
        cases.append(Case(folder / f"longer-{name}"))
    return cases


def python(case: Case) -> np.ndarray | None:
    try:
        return normalize(read_pixels(case.path.read_bytes(), case.preprocess)[0][None], case.preprocess)[0]
    except UnreadableImageError:
        return None


def main() -> int:
    warnings.simplefilter("ignore")
    rng = random.Random(0)
    pictures = photos.photographs()
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        cases = [*sizes(folder, pictures, rng), *kinds(folder, pictures, rng), *damage(folder, rng)]
        lines = "".join(case.line() for case in cases).encode()
        done = subprocess.run([sys.argv[1]], input=lines, capture_output=True, check=True)
        found = np.frombuffer(done.stdout, np.float32)
        wrong, others, refused, begin = [], 0, 0, 0
        for case in cases:
            shape = (case.channels, *case.crop)
            here = found[begin : begin + int(np.prod(shape))].reshape(shape)
            begin += here.size
            want = python(case)
            if want is None and np.isnan(here.flat[0]):
                refused += 1
            elif want is None or np.isnan(here.flat[0]):
                others += case.damaged
                wrong += [] if case.damaged else [f"{case}: one refuses it"]
            elif not np.array_equal(here, want) and case.damaged:
                others += 1
            elif not np.array_equal(here, want):
                wrong.append(f"{case}: {(here != want).mean():.1%} of the values differ")
    print(
        f"{len(cases)} images: {len(wrong)} differ, {refused} refused by both, {others} damaged ones read differently"
    )
    print("\n".join(wrong))
    return int(bool(wrong) or others > OTHER_LIBJPEG * len(cases) or begin != found.size)


if __name__ == "__main__":
    sys.exit(main())
