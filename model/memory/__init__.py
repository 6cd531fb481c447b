"""The memory planner: where weights are, tiles, and what a clip takes.

request       the input; ``plan`` is the entry, ``report`` the result as text and JSON
search        the whole run; ``stage_choice`` one DiT, ``vae_choice`` one place of the VAE
vae_plan      the VAE alone: its tiles and peak; ``vae_places`` its four places in a clip
dit_bytes     what denoising holds beside weights
estimate      the time, by the measured rates of ``rates.json``; ``cards`` chooses the card
"""
