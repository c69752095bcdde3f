"""Triton kernels and their launchers: tensors and numbers in, never a group.

Importing this package imports triton; only `backends/triton.py` and `backends/hopper.py` do, and
`layout.py` and `token_loss.py` by name, when they meet a GPU's tensor.
"""
