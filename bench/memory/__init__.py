"""What a clip takes of a card's memory, when, and by what."""
