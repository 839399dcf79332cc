"""What a run needs before it begins: memory, time, alternatives."""
