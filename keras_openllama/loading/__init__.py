"""`from_preset`: finds the files of a model and loads its weights."""
