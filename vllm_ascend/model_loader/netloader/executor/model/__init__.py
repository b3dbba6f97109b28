"""What knows `nn.Module`: which of a model's tensors are exchanged, in either layout."""
