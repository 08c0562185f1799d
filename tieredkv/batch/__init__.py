"""Answers a file of questions, in a file of answers that an interrupted run can continue."""
