"""The network of the paper's Table I: each candidate is the newest event of the history."""
