"""What a run says about itself: the clock, the result files, the table."""
