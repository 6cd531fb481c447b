"""Runs that can be ended at any moment and go on from there.

state         the folder of a run; ``files`` writes its tensors, ``fingerprint`` tells inputs apart
changes       what forbids a run to go on, and what makes the rest differ
clip          a clip of which each result is kept as soon as it is made
"""
