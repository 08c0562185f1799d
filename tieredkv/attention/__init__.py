"""Attention over keys and values wherever they are: the registered function and the torch reference."""
