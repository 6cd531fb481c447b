"""DiTs whose weights are not all on the device: ``placement`` decides where, ``placed`` builds, ``stream`` copies."""
