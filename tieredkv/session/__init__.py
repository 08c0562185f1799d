"""One video, many questions."""
