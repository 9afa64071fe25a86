"""Many exports in one run: the matrix file, its cells, their processes and the report."""
