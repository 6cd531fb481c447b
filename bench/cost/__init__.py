"""The detailed cost model, which plans do not need: a clip's operations, bytes, memory and seconds, part by part.

Nothing here runs a model or needs a GPU. Reading order: ``work`` (what is counted), ``dit`` and ``vae`` (closed forms),
``configuration`` (a clip) and ``pipeline`` (part by part), ``profiles`` (rates). A multiply-add is two operations.
Everything in seconds is predicted.
"""
