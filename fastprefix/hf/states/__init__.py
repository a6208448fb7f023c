"""Models whose layers keep a state of the text besides keys and values, such as hybrid models."""
