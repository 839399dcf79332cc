"""From text files to batches of tokens. Needs the extra `train`."""
