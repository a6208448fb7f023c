"""Checks that a patched model computes what it computed before, on a few tokens."""
