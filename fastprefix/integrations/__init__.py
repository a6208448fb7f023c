"""Other libraries that are told of fastprefix when they are imported."""
