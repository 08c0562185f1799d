"""Answering a file of questions, written to a file of answers that can be resumed."""
