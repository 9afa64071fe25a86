"""The parity gate, latency measurement, and verification of a bundle on another machine."""
