"""Templates of pages, and values that all of them have."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable
from functools import cache
from html import escape
from importlib.resources import files
from typing import Any

import jinja2
import numpy as np
from PIL import Image

from export_zoo.base.package import __version__

_THUMBNAIL = 112
"""Length of the longer side of small pictures, in pixels."""


@cache
def _environment(html: bool) -> jinja2.Environment:
    folder = files(__package__)
    loader = jinja2.FunctionLoader(lambda name: folder.joinpath(name).read_text(encoding="utf-8"))
    environment = jinja2.Environment(
        loader=loader,
        autoescape=html,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    filters: dict[str, Callable[..., Any]] = {"decibels": decibels, "plain": plain}
    environment.filters |= filters
    return environment


def render(template: str, *, title: str, **values: Any) -> str:
    """A page.

    Args:
        template: name of its file, `NAME.html.jinja` or `NAME.md.jinja`; values are escaped in HTML.
    """
    found = _environment(".html." in template).get_template(template)
    return found.render(title=title, made_by=f"export-zoo {__version__}", **values)


def decibels(value: float | None) -> str:
    """SQNR for people; a dash where there is no error."""
    return "-" if value is None else "not finite" if value <= -200 else f"{value:.1f}"


_MARKUP = re.compile(r"[\\\\`*~\[\]|]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")
"""Characters that mean something in Markdown; an underscore inside of a word does not."""


def plain(text: object) -> str:
    """Text as it is in Markdown, in a table, too: one line, and none of it is HTML, a link or the end of a cell."""
    return _MARKUP.sub(r"\\\g<0>", escape(" ".join(str(text).split()), quote=False))


def thumbnail(pixels: np.ndarray, size: int = _THUMBNAIL) -> str:
    """A small PNG, base64; empty for images that are neither gray nor RGB in 8 bits.

    Args:
        pixels: [H, W, C].
        size: length of its longer side at most, in pixels.
    """
    if pixels.dtype != np.uint8 or pixels.shape[-1] not in (1, 3):
        return ""
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    if max(image.size) > size:
        image.thumbnail((size, size))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()
