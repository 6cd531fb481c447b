"""The benchmarks, ``python -m bench``: a folder a subject, each with its ``command.py`` beside what it measures.

csg, memory, precision, cost             the whole clip: time, memory, accuracy, predictions
attention, dit, vae, operators           kernels, layers and autoencoders against their peers
static, tuning, sanitize                 what the compiler made of kernels; their configurations; their faults
campaign, hardware                       everything in one run on a rented card; the hardware tests
records, report                          results as files, compared, and as pages
harness                                  what every benchmark runs in
"""
