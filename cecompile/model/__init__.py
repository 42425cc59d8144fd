"""The stock model: what it is made of, whether trees can compute it, its checkpoint read once, and proof of that."""
