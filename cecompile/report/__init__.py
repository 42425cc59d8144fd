"""How results are shown: tables in a terminal, a card, a document."""
