"""Shared parts of the commands: ``options`` (their parsing, errors as one line) and ``request`` (resolved options)."""
