"""Runs that can be ended at any moment and go on from there.

state         the folder of a run and its files
job           what the run makes, of which inputs; what forbids it to go on, and what makes the rest differ
clip          a clip of which each result is kept as soon as it is made
"""
