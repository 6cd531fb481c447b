"""The memory planner: where weights are, tiles, and what a clip takes.

request       the input; ``plan`` is the entry, ``report`` the result as text and JSON
search        the whole run; ``dit_bytes`` one DiT, ``vae_plan`` the VAE: its tiles and peak
estimate      the time, by the measured rates of ``rates.json``
"""
