"""The traces of a run: the clock's times, the journal and the result files, with their reader, check and comparison."""
