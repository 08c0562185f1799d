"""Bytes, slots and copies of both tiers. What is kept, selected or attended to is decided elsewhere.

Shapes: `K` KV heads of a layer, `C` chunk tokens, `D` head dim, `S` slots (pages) of the device pool.
A chunk's keys and values lie side by side, `(2, C, D)`, in both tiers: the unit of transfer.
"""
