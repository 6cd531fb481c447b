"""Shared parts of the commands: ``options`` (their parsing, errors as one line), ``request`` (resolved options) and
``interruption`` (what comes while torch is imported).
"""
