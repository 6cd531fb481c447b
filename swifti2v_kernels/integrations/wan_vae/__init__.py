"""The Wan VAE of any host by the library's convolutions: ``recipes`` (what is replaced), ``layers``, ``weights``."""
