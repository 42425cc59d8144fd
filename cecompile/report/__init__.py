"""Shows results: tables in a terminal, a card, a document."""
