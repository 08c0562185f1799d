"""`Ops` on a CPU, compiled by Numba. Contracts and shapes: `ops.base`."""
