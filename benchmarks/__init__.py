"""Benchmarks and studies that produce the figures in README and docs/."""
