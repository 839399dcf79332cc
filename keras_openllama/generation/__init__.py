"""From prompts to new tokens: KV cache, token loop, beam search, stop strings."""
