"""The data plane: bytes between tensors. It never opens a control socket."""
