"""Benchmarks: end-to-end against segment-wise generation, on this machine."""
