"""What patching does to a model: the probe, the hooks, positions, and the state it leaves there."""
