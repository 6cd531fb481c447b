"""The Wan autoencoder: ``model``, ``encoder``, ``decoder``, ``layers``; ``tiles`` cuts frames exactly."""
