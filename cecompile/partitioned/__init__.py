"""A model of which not all layers are in one place: the stages of a pipeline, and layers streamed from disk."""
