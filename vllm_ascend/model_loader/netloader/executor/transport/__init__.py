"""Ways in which runs of blocks travel: HTTP, and two-rank process groups."""
