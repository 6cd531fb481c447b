"""The machine: ``cards``, ``host`` memory, memory ``counted`` without a device, ``measure`` (times, sizes, peaks)."""
