"""A stand-in for the DiT of the Wan2.1 and Wan2.2 repositories: names, structure and dtypes are theirs, sizes tiny."""
