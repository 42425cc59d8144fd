"""From texts to fixed-shape work: token ids, token trees, rows, buckets. NumPy only, no torch."""
