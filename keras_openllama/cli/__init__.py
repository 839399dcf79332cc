"""The commands of the command line; in each, `add` describes it and `run` runs it."""
