"""Compilation for GPUs that are not there, and what the machine code costs. Nothing is timed."""
