"""Models whose layers keep a state of the text beside keys and values, such as hybrid models."""
