"""What a load consists of: what it fills, whom it looks for, what it does with each source."""
