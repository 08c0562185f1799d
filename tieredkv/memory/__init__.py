"""Bytes, slots and copies of both tiers. What is kept, selected or attended to is decided elsewhere.

Shapes: `K` KV heads of a layer, `C` chunk tokens, `D` head dim, `S` slots (pages) of the device pool.
A chunk's keys and values are one record (`codecs.base`) in both tiers: the unit of transfer.
"""
