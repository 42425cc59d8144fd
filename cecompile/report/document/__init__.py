"""A result as a card and a document to hand on."""
