"""What backs the figures in the docs."""
