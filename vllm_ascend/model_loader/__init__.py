"""Model loaders that this package adds to vLLM."""
