"""The control plane: who talks to whom. It never touches a tensor."""
