"""Pure functions on tensors: no I/O, no state, no knowledge of where tensors are stored.

Shapes: `H` query heads, `K` KV heads, `G = H // K`, `N` cached tokens, `C` chunk tokens, `D` head dim.
"""
