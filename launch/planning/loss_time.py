"""Seconds of the loss on one rank's rows: all of it, or its passes S and T apart."""

from launch.planning.hardware import Hardware
from vocab_parallel import BackwardPlan

# Seconds of a microbatch's kernel launches, and what the products of less than 128 rows cost, in
# bytes for each number of the hidden states; as benchmarks.loss and benchmarks.scaling found them.
LAUNCHES = 1e-4
TAIL_BYTES = 56
# Where all stages carry the vocabulary: the share of dE is copied, scaled, and the targets' rows
# are added to it, in float32; bytes for each number of it, counted in the code and not fitted.
SHARE_BYTES = 40


def loss_seconds(
    backward_plan: BackwardPlan,
    tokens: int,
    rows: int,
    hidden: int,
    itemsize: int,
    hardware: Hardware,
) -> float:
    """Estimate forward and backward of the loss on one rank's rows.

    The products at the hardware's rate; the passes over logits that are kept, and those over
    float32 sums that tiles are added to, at its copy's; what was measured above that; the launches
    of kernels; and where rows are no multiple of 8 the last few, whose products go by themselves.
    """
    kept = backward_plan.kept_rows if backward_plan.backward == "recompute" else rows
    products = tokens * hidden * (6 * rows + 2 * (rows - kept))
    # Read once in forward and in backward, and written there; those of a part in backward alone.
    # (On Hopper forward reads none; its time was found the same.)
    moved = (2.0 if kept < rows else 3.0) * tokens * kept * itemsize
    moved += sum(_moved_sums(backward_plan, tokens, rows, hidden))
    ideal = products / hardware.product_flops + moved / hardware.copy_bytes
    if rows % 8:
        ideal += TAIL_BYTES * tokens * hidden / hardware.copy_bytes
    return LAUNCHES + ideal * hardware.loss_overhead[backward_plan.backward]


def passes_seconds(
    backward_plan: BackwardPlan,
    tokens: int,
    rows: int,
    hidden: int,
    itemsize: int,
    hardware: Hardware,
) -> tuple[float, float]:
    """Estimate S and T, where all stages carry the vocabulary, as `loss_seconds` does.

        S   the logits, their statistics, and dE of the local softmax
        T   dC

    Logits that are kept serve both: three products. Otherwise S works on some tokens at a time,
    makes their logits once, and T makes them again: four products.
    """
    whole = backward_plan.backward == "probs"
    one = 2.0 * tokens * rows * hidden
    s_products, t_products = 2 * one, one if whole else 2 * one
    # S leaves them as they are, and writes the gradient of a part of the tokens beside them.
    passes = (3, 2 if whole else 0)
    logits = tokens * rows * itemsize
    s_sums, t_sums = _moved_sums(backward_plan, tokens, rows, hidden)
    s_moved = passes[0] * logits + s_sums + SHARE_BYTES * tokens * hidden
    t_moved = passes[1] * logits + t_sums
    if rows % 8:  # of three products two are S's
        s_moved += TAIL_BYTES * tokens * hidden * 2 / 3
        t_moved += TAIL_BYTES * tokens * hidden / 3
    overhead = hardware.loss_overhead[backward_plan.backward]
    s_ideal = s_products / hardware.product_flops + s_moved / hardware.copy_bytes
    t_ideal = t_products / hardware.product_flops + t_moved / hardware.copy_bytes
    return LAUNCHES + s_ideal * overhead, LAUNCHES / 2 + t_ideal * overhead


def _moved_sums(
    backward_plan: BackwardPlan, tokens: int, rows: int, hidden: int
) -> tuple[float, float]:
    """Return the bytes of float32 sums that tiles of dE, and of dC, are added to."""
    tile = backward_plan.tile
    row_tiles, token_tiles = -(-rows // tile.rows), -(-tokens // tile.tokens)
    # Read and written.
    hidden_sums = row_tiles * tokens * hidden * 8.0 if row_tiles > 1 else 0.0
    row_sums = token_tiles * rows * hidden * 8.0 if token_tiles > 1 else 0.0
    return hidden_sums, row_sums
