"""The test suite's hardware tests, as rows of a result: ``python -m bench tests``."""
