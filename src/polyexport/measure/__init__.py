"""Whether an artifact agrees with PyTorch, and how fast it is."""
