"""Device kernels, each beside a readable PyTorch reference with the same signature.

A package here is one operation. Its `__init__` is what the rest of the trainer calls: CUDA tensors go to Triton, all
others to the reference. A kernel that fails raises; nothing here falls back in silence.
"""
