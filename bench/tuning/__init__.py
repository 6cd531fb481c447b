"""The search for kernel configurations on a card."""
