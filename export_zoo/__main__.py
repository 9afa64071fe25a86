"""`python -m export_zoo` is `export-zoo`."""

from export_zoo.exporter.cli.app import run

run()
