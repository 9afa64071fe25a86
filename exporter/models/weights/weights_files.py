"""Finds a weights file, on disk or by download, and identifies torchvision's own weights."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError
from urllib.parse import urlparse

import torch
from torchvision.models import WeightsEnum, get_model_weights

from export_zoo.base.errors import BadInputError, EnvironmentFailureError
from export_zoo.base.graph_io import sha256_of
from export_zoo.exporter.options import ExportOptions

WEIGHT_SUFFIXES = (".pth", ".pt", ".safetensors")


@dataclass(frozen=True)
class WeightsFile:
    """A state dict on disk. `known`: the torchvision weights with the same hash, if any."""

    path: Path
    sha256: str
    known: WeightsEnum | None


def _hash_in_name(name: str) -> str | None:
    match = re.search(r"-([0-9a-f]{8,})\.", name)
    return match[1] if match else None


def names_of(model: str) -> list[str]:
    """Names of a model's torchvision weights, such as `IMAGENET1K_V1`."""
    return [w.name for w in get_model_weights(model)]


def by_name(model: str, name: str, *, option: str) -> WeightsEnum:
    """A model's weights by name: `DEFAULT`, `IMAGENET1K_V2` or `ResNet50_Weights.IMAGENET1K_V2`.

    Raises:
        BadInputError: no such weights.
    """
    enum = get_model_weights(model)
    prefix, _, short = name.rpartition(".")
    if (not prefix or prefix == enum.__name__) and short in enum.__members__:
        return enum[short]
    takes_files = option == "--weights"
    raise BadInputError(
        f"{option} {name}: {model} has no such weights"
        + (", and no such file exists" if takes_files else ""),
        hint=f"choose from {', '.join(names_of(model))}"
        + (", a .pth or .safetensors file, or none" if takes_files else ""),
    )


def looks_like_file(weights: str) -> bool:
    return weights.endswith(WEIGHT_SUFFIXES) or "/" in weights or Path(weights).exists()


def local_file(path: Path, model: str | None = None) -> WeightsFile:
    """A state dict file. Its hash shows whether it is one of a torchvision model's own weights.

    Raises:
        BadInputError: not a readable file, another suffix, or a hash in its name that its content does not have.
    """
    if path.is_dir():
        raise BadInputError(
            f"--weights {path}: is a directory", hint="pass a .pth or .safetensors state dict"
        )
    if not os.access(path, os.R_OK) and path.exists():
        raise BadInputError(
            f"--weights {path}: cannot be read: permission denied", hint="check its permissions"
        )
    if not path.is_file():
        raise BadInputError(f"--weights {path}: no such file", hint="pass a .pth or .safetensors state dict")
    if path.suffix not in WEIGHT_SUFFIXES:
        raise BadInputError(
            f"--weights {path}: does not have the suffix of a weights file",
            hint=f"use {', '.join(WEIGHT_SUFFIXES)}",
        )
    sha256 = sha256_of(path)
    for weights in get_model_weights(model) if model is not None else ():
        prefix = _hash_in_name(weights.url)
        if prefix and sha256.startswith(prefix):
            return WeightsFile(path, sha256, weights)
        if prefix and _hash_in_name(path.name) == prefix:
            raise BadInputError(
                f"--weights {path}: its name says {weights} (SHA-256 {prefix}...), but its SHA-256 is "
                f"{sha256[:8]}...: a damaged download, or other weights under that name",
                hint="download it again, or rename it if it was changed on purpose",
            )
    return WeightsFile(path, sha256, None)


def place_of(weights: WeightsEnum) -> Path:
    """Where PyTorch's hub directory has the file of torchvision weights, once it is downloaded."""
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(weights.url).path).name


def downloaded(weights: WeightsEnum) -> WeightsFile:
    """The file of torchvision weights, from PyTorch's hub directory or from the network.

    Raises:
        EnvironmentFailureError: the download failed, or the disk is full.
    """
    path = place_of(weights)
    name = path.name
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(weights.url, str(path), _hash_in_name(name), progress=False)
        except (URLError, OSError, RuntimeError) as error:
            reason = getattr(error, "reason", None) or error
            raise EnvironmentFailureError(
                f"--weights {weights}: download of {weights.url} failed: {reason}",
                hint=f"download that file on a machine with network access, then pass --weights ./{name} "
                f"(or put it into {path.parent}); --weights none needs no trained weights",
            ) from error
    sha256 = sha256_of(path)
    prefix = _hash_in_name(name)
    if prefix and not sha256.startswith(prefix):
        raise BadInputError(
            f"{path}: damaged (its SHA-256 is not {prefix}...)", hint="delete it and run again"
        )
    return WeightsFile(path, sha256, weights)


@dataclass(frozen=True)
class ChosenWeights:
    """The weights that a network gets: their kind, name and file."""

    kind: str
    name: str
    sha256: str = ""
    path: Path | None = None


def chosen(options: ExportOptions, default_kind: str, default_name: str) -> ChosenWeights:
    """The weights that --weights selects: none, a file, or DEFAULT, the weights of the network's source.

    Raises:
        BadInputError: no such file.
    """
    if options.weights == "none":
        return ChosenWeights("random", "random")
    if options.weights == "DEFAULT":
        return ChosenWeights(default_kind, default_name)
    file = local_file(Path(options.weights))
    return ChosenWeights("file", file.path.name, file.sha256, file.path)
