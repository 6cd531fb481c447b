"""Everything that real hardware must answer, in one run."""
