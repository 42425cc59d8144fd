"""A run from its options to its result: the model and its engine made ready, passes done and judged, all written."""
