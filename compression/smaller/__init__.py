"""What makes a network smaller or faster: distilling, pruning, quantizing, packing."""
