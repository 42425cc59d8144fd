"""The machine as found, and the faults that will stop a run there or slow it down."""
