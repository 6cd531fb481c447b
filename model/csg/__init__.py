"""Stage II's generation: ``sampler`` (segments, windows, modes), ``denoiser`` (steps of a window), ``schedule``."""
