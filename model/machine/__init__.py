"""The machine that runs: ``host`` memory, memory ``counted`` without a device, ``measure`` (times, sizes, peaks)."""
