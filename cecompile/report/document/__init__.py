"""Makes the card and the document of a result."""
