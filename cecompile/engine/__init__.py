"""The static pass: attention over trees, one compiled forward per bucket, and checks against the stock model."""
