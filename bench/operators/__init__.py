"""The library's operators as the benchmarks see them: found by their ``CASES``, checked, and timed at real sizes."""
