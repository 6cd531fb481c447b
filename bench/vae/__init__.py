"""``python -m bench vae``: the VAE, its tiles and its convolutions."""
