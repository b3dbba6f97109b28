"""A checkpoint seen through the parameters that it was copied into."""
