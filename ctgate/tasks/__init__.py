"""Tasks: data with a question, each in its own module."""
