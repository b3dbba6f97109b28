"""What weights are on paper: manifest, blocks, digests. Pure: no tensor, no device, no socket."""
