"""From a graph and ranges to engines: build, run, compare, bundle. Never imports torch."""
