"""The parity gate, latency, and verifying a bundle again on another machine."""
