"""From prompts to new tokens: KV caches, samplers, beam search, stop strings."""
