"""The stock model: its parts, support for trees, its checkpoint read once, and proof that it stays unchanged."""
