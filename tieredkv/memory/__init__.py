"""Bytes, slots and copies. Knows nothing of attention: no queries, no scores, no policy.

Shapes: `K` KV heads of a layer, `C` chunk tokens, `D` head dim, `S` slots (pages) of the device pool.
A chunk's keys and values lie side by side, `(2, C, D)`, on the host as on the device: the unit of transfer.
"""
