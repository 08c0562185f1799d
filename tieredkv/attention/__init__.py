"""Attention: the function registered with transformers, and exact attention in torch."""
