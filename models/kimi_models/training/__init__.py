"""Training tiny checkpoints on text that every Python carries."""
