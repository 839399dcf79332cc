"""From raw text to an exact, resumable stream of training batches."""
