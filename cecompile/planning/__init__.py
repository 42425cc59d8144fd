"""Decisions before a run: size of buckets, memory, division of layers, estimated time."""
