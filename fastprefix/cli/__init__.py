"""The command ``fastprefix``."""

from fastprefix.cli.app import main

__all__ = ["main"]
