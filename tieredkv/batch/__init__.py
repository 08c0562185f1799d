"""A file of questions, and the file of their answers."""
