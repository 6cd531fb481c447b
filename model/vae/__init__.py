"""The Wan autoencoder: ``model``, its ``encoder``, ``decoder`` and ``layers``; ``tiles`` cuts frames exactly."""
