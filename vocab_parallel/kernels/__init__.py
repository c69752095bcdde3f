"""Triton kernels and what launches them: tensors and numbers in, never a process group.

Importing this package imports triton; only `local/tile_ops.py`, `sharded/layout.py` and
`sharded/token_loss.py` do, when they meet a GPU's tensor.
"""
