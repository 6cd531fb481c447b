"""``python -m bench tests``: the test suite's hardware tests, as rows."""
