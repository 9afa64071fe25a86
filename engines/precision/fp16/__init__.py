"""FP16: float16 graphs, and their twins that run on a CPU."""
