"""Comparisons with other libraries, both sides measured in one run."""
