"""Write a folder of real photographs: overlapping crops of those that scikit-image and scikit-learn carry.

python examples/photos.py --out demo/photos --count 160
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image
from skimage import data
from sklearn.datasets import load_sample_images

NAMES = """
astronaut brick camera cat chelsea coffee coins colorwheel grass gravel hubble_deep_field
immunohistochemistry logo moon page retina rocket text
""".split()


def photographs() -> list[Image.Image]:
    """Those that are installed; nothing is downloaded."""
    found = []
    for name in NAMES:
        try:
            found.append(Image.fromarray(np.asarray(getattr(data, name)())).convert("RGB"))
        except Exception as error:  # a newer scikit-image may fetch one that this one carries
            print(f"{name}: left out ({type(error).__name__})")
    return found + [Image.fromarray(image) for image in load_sample_images().images]


def write(directory: Path, count: int, seed: int = 0) -> int:
    """Write `count` JPEG crops of at least half the photograph's shorter side, no two alike."""
    directory.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    images = photographs()
    for index in range(count):
        image = images[index % len(images)]
        short = min(image.size)
        width, height = (int(rng.integers(short // 2, side + 1)) for side in image.size)
        left, top = (
            int(rng.integers(0, side - crop + 1))
            for side, crop in zip(image.size, (width, height), strict=True)
        )
        crop = image.crop((left, top, left + width, top + height))
        crop.save(directory / f"photo-{index:04}.jpg", quality=90)
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo/photos"))
    parser.add_argument("--count", type=int, default=160)
    options = parser.parse_args()
    print(f"{options.out}: {write(options.out, options.count)} photographs")


if __name__ == "__main__":
    main()
