"""Makes the pictures of pages in docs/ from a bundle of the digits demo (`make demo`), in Debian's chromium.

    python docs/make_pictures.py demo/resnet18-digits.bundle

Needs matplotlib and playwright, as `pip install -e '.[dev]'` brings them.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

WIDTH, HEIGHT = 900, 1500
COLOURS = 64
"""Colours of a picture: pages have few, and files stay small."""

PAGES = {
    "diagnose": ["diagnose", "--images", "32"],
    "report": ["report"],
    "bench": ["bench", "--seconds", "1"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    bundle = parser.parse_args().bundle
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        sys.exit("chromium is not installed: apt install chromium")
    with tempfile.TemporaryDirectory() as directory, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for name, (command, *options) in PAGES.items():
            page, shot = Path(directory) / f"{name}.html", Path(directory) / f"{name}.png"
            arguments = [command, str(bundle), *options, "--html", str(page), "--quiet"]
            subprocess.run([sys.executable, "-m", "export_zoo", *arguments], check=True)
            shown = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
            shown.goto(page.as_uri())
            height = min(HEIGHT, shown.evaluate("document.documentElement.scrollHeight"))
            shown.screenshot(path=shot, clip={"x": 0, "y": 0, "width": WIDTH, "height": height})
            out = Path(__file__).with_name(f"{name}.png")
            Image.open(shot).convert("P", palette=Image.Palette.ADAPTIVE, colors=COLOURS).save(
                out, optimize=True
            )
            print(f"{out}: {out.stat().st_size / 1e3:.0f} kB")
        browser.close()


if __name__ == "__main__":
    main()
