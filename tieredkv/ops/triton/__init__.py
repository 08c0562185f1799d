"""Triton kernels of a decoding step. Each has a twin in plain torch with the same signature, named beside it.

They run compiled on a CUDA device and, where `TRITON_INTERPRET=1` is set before Triton is imported, anywhere. Nothing
here synchronises with the host, and every launch depends on shapes alone, so a step can be captured in a CUDA graph.
"""
