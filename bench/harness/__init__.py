"""The frame that every benchmark runs in.

registry     the subcommands; ``session`` runs one: device, folder, section
timing       calls in turns, ceilings of the card; ``environment`` says what they ran on
interpreted  the part of a benchmark that runs in Triton's interpreter
"""
