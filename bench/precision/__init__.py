"""What 8-bit weights and products cost in accuracy, for one layer and for a window through the whole DiT."""
