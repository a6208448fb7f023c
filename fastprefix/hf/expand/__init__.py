"""``fallback="expand"``: prefixes in the KV cache of models whose attention cannot be replaced."""
