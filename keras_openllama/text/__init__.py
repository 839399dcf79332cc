"""Text to token ids and back, and normalization of user inputs."""
