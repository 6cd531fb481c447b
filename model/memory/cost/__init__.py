"""The cost of the pipeline from shapes alone: operations, bytes and peak memory, and predicted seconds on a GPU.

Nothing here runs a model or needs a GPU. Reading order: ``work`` (what is counted), ``dit`` and ``vae`` (closed forms),
``configuration`` (a clip) and ``pipeline`` (part by part), ``gpus`` and ``profiles`` (rates). ``bench.cost`` compares
it with known times.

A multiply-add is two operations. Everything in seconds is predicted.
"""
