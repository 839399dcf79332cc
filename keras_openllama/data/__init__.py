"""The data pipeline from text to batches of token ids. Needs the extra `train`."""
