"""All sources of models: how their names are recognized. `exporter/models/sources` has what each does.

To add one, add a module there and a line to SOURCES. Importing this loads no library.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Source:
    """A source of models."""

    name: str
    """Its name in the manifest."""
    module: str
    """Its module in `exporter/models/sources`, with `resolve` and `construct`."""
    prefix: str = ""
    """Beginning of the names of its models, which their short names leave out."""
    sign: str = ""
    """Sign that all names of its models have."""
    libraries: tuple[str, ...] = ()
    """Distributions that its networks come from."""
    listed: bool = False
    """Whether `export-zoo list` and globs know its models, and options of torchvision's functions fit them."""
    own_code: bool = False
    """Whether its networks are the user's code, which may do anything."""

    def has(self, model: str) -> bool:
        """Whether a model's name is one of this source."""
        return model.startswith(self.prefix) and self.sign in model


SOURCES = (
    Source("timm", "timm_zoo", prefix="timm/", libraries=("timm",)),
    Source("python", "user_code", sign=":", own_code=True),
    Source("torchvision", "torchvision_zoo", libraries=("torchvision",), listed=True),
)
"""The first one whose names a name is like has the model; the last one takes all others."""


def source_of(model: str) -> Source:
    """The source of a model, by its name."""
    return next(source for source in SOURCES if source.has(model))


def short_name(model: str) -> str:
    """The model's name without the parts that a file name cannot hold: `vit` for `nets/vit.py:vit`."""
    return model.removeprefix(source_of(model).prefix).rpartition(":")[2].replace("/", "-")
