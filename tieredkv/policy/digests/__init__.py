"""Digests: what stands for a chunk's keys when chunks are ranked."""
