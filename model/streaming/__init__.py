"""A DiT whose layers' weights are not all on the device: ``placement`` (where), ``placed`` (made so), ``stream``."""
