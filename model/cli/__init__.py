"""What the commands share: ``options`` (their parsing, errors as one line) and ``request`` (what they ask for)."""
