"""Finds the faults of a machine that stop a run or slow a run down."""
