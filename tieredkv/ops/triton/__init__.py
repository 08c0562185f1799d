"""`Ops` as Triton kernels. Contracts: `ops.base`; each kernel has a twin of the same name in `torch_ops` or `policy`.

They run compiled on a CUDA device and, where `TRITON_INTERPRET=1` is set before Triton is imported, anywhere. Nothing
here waits for the device, and every launch depends on shapes alone, so a step can be captured in a CUDA graph.
"""
