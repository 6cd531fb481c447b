"""Conditional Segment-wise Generation for any DiT: ``plan`` (segments, windows, noise) and ``sampler``."""
