"""The static pass: attention over trees, one compiled forward per bucket, and the checks that it is right."""
