"""INT8: Q/DQ graphs, and how weights, scales and layers are chosen."""
