"""The GPU suite's own parts: what `benchmarks/gpu.py` runs, times and writes."""
