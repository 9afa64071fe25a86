"""Names of choices of tuning, as manifests record them. Loads no libraries."""

from __future__ import annotations

OFF = "off"
"""The candidate that leaves everything as it is."""

APPROXIMATE = "0.5 approximate"
"""Equalization through ReLU6, too. The result is not the same function on all images."""

GATES = "0.75 gates"
"""Equalization that scales products of gates, too."""
