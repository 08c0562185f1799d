"""Checks of the machine, for `tieredkv doctor`."""
