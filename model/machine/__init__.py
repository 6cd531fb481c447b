"""The machine: ``host`` memory, memory ``counted`` without a device, and ``measure`` (times, sizes, peaks)."""
