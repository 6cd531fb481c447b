"""What the pipeline costs, from shapes alone: operations, bytes and peak memory, and predicted seconds on a GPU.

Nothing here runs a model or needs a GPU. Reading order: ``work`` (what is counted), ``dit`` and ``vae`` (closed forms),
``pipeline`` (a clip, part by part), ``gpus`` and ``profiles`` (rates), ``calibration`` (against which times the rates
were checked), ``paper`` (what the paper reports), ``tables`` (rows to print).

A multiply-add is two operations. Everything in seconds is predicted unless it is named measured or published.
"""
