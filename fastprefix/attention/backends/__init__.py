"""Three implementations of one contract. They never import each other."""
