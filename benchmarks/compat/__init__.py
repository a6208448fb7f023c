"""What ``benchmarks/compatibility.py`` consists of: models, the oracle, libraries, capabilities."""
