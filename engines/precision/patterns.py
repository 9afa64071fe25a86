"""Patterns that name nodes of a graph, as --keep-float has them."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

import onnx_ir as ir

from export_zoo.base import graph_io
from export_zoo.base.errors import UsageError


def is_named(node: ir.Node, pattern: str) -> bool:
    """Whether a glob matches a node's name, the path of its module, or that of a module around it."""
    module = graph_io.module_of(node)
    return (
        fnmatchcase(str(node.name), pattern)
        or fnmatchcase(module, pattern)
        or fnmatchcase(module, f"{pattern}.*")
    )


def nodes_named(graph: ir.Graph, patterns: Sequence[str], option: str) -> frozenset[str]:
    """Names of the nodes that a pattern matches.

    Args:
        option: where the patterns come from, for messages.

    Raises:
        UsageError: a pattern matches no node.
    """
    found: set[str] = set()
    for pattern in patterns:
        names = {str(node.name) for node in graph if is_named(node, pattern)}
        if not names:
            modules = dict.fromkeys(module for node in graph if (module := graph_io.module_of(node)))
            raise UsageError(
                f"{option} {pattern!r}: no node and no module has this name",
                hint=f"give a module path, such as {', '.join(list(modules)[:4])}, or a node name",
            )
        found |= names
    return frozenset(found)
