"""Compare outputs with a reference: rows to compare, metrics, tolerances."""
