"""Ways to tune a model compared: one budget, one data set, every method."""
