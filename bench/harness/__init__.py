"""The frame that every benchmark runs in.

registry     the subcommands; ``session`` runs one: device, folder, section
timing       calls in turns, ceilings of the card; ``environment`` says what they ran on
interpreter  repairs of Triton's interpreter; ``interpreted`` is the part of a benchmark that runs in it
"""
