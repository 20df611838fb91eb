"""Models of every kind, built from code or config with random weights, and what apoptosis does with each."""
