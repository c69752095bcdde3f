"""Triton kernels and what launches them: tensors and numbers in, never a process group.

Importing this package imports triton; `impls/passes.py` alone does, when it meets a GPU's tensor.
"""
