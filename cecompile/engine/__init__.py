"""The model: loading it unchanged, attention over trees, and one static pass per bucket."""
