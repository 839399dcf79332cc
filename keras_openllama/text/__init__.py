"""Text to token ids and back, and what users pass, in one form."""
