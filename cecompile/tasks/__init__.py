"""Questions: their kinds, how files become questions, and how an answer is judged."""
