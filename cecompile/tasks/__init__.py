"""What a question is, how files become questions, and how an answer is judged."""
