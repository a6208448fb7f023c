"""A prompt's keys and values, recorded in one forward pass of the model."""
