"""What every benchmark runs in: its ``registry``, ``session``, ``timing``, ``environment`` and ``base`` revision."""
