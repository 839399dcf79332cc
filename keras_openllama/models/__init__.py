"""The four public classes: backbone, tokenizer, preprocessor and causal LM."""
