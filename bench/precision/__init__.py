"""The benchmark of accuracy: errors of 8-bit weights and matrix multiplications, in one layer and in the whole DiT."""
