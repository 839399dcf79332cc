"""How the next token is chosen: settings, the choice itself, random numbers."""
