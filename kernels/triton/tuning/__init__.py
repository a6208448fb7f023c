"""What is timed on the GPU at hand: tiles (:mod:`.tune`), and how decode cuts its keys.

The latter is :mod:`.splitting`. :mod:`.store` keeps both on disk.
"""
