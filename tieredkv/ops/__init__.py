"""The operations of a decoding step: in plain torch, and as Triton kernels."""
