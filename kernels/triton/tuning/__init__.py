"""Tiles are timed on the GPU at hand (:mod:`.tune`) and kept on disk (:mod:`.store`)."""
