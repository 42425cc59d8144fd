"""What a machine offers, and what will go wrong or be slow there."""
