"""What runs in each attention layer of a patched model: masks, windows, and the operator's call."""
