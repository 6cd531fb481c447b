"""The benchmark of memory: how much of a card a clip takes, when, and by what."""
