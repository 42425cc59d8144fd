"""Texts become work of fixed shapes: token ids, token trees, rows, buckets. NumPy only, no torch."""
