"""Which way backward finds the logits, from shapes, microbatches in flight and a memory budget.

    way          flops          kept between forward and backward, each microbatch in flight
    recompute    8 N D R        nothing
    probs        6 N D R        the logits [N, R] in the operands' dtype (float32 on a CPU)
    gradients    6 N D R        both gradients, [N, D] and [R, D]; for a scalar loss alone

"probs" turns its logits into probabilities and those into the gradient in one pass, in place. Where
"auto" has to recompute, it keeps the logits of as many rows as the budget has room for: those
take the place of the tile that the others are worked on in.
"""

from dataclasses import dataclass

import torch

from vocab_parallel.impls.base import Demand, Way
from vocab_parallel.impls.tiles import TileShape, check_budget, tile_shape, whole_tiles

# What the loss may hold beside its inputs, its two gradients and float32 sums of their size, in
# bytes. That is a tile of logits: a whole shard of them exists where it is no larger, or where the
# caller gives room for it.
DEFAULT_MEMORY_BUDGET = 64 * 2**20
# Logits of 2 bytes in 32, which kernels read and write whole.
_SECTOR = 16
# Fewer tokens at a time than this make the products of "gradients" slower than "recompute".
_FEWEST_TOKENS = 1024


@dataclass(frozen=True)
class BackwardPlan:
    """What a call will do and hold; the bytes are those that `memory_budget` counts.

    Attributes:
        backward: the way.
        tile: tokens and rows whose logits are worked on at a time.
        kept_rows: of how many rows the logits are kept; all with "probs", none with "gradients".
        kept_bytes: held from forward to backward, for each microbatch in flight.
        logits_bytes: of logits, while a microbatch is worked on, beside what is kept.
        float32_bytes: of float32 sums of the gradients' sizes, not counted by the budget.
        peak_bytes: held at the worst moment above inputs, both gradients and all else included.
    """

    backward: Way
    tile: TileShape
    kept_rows: int
    kept_bytes: int
    logits_bytes: int
    float32_bytes: int
    peak_bytes: int


def plan_backward(
    tokens: int,
    rows: int,
    hidden_size: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    backward: str = "auto",
    memory_budget: int | None = None,
    microbatches_in_flight: int = 1,
    degree: int = 1,
    scalar_loss: bool = True,
    device_type: str = "cuda",
    chunk_tokens: int | None = None,
    chunk_rows: int | None = None,
    temporaries: int = 2,
    triton: bool = True,
) -> BackwardPlan:
    """Tell what ``impl="chunked"`` would do for a shard, and what it would hold.

    Args:
        tokens: N, those of the loss (of all ranks in the gathering layouts).
        rows: R, of the largest shard.
        hidden_size: D.
        dtype: of hidden states and classifier.
        backward: "auto", or the way by name.
        memory_budget: bytes; None means 64 MiB. A way that is named is taken even where what it
            keeps does not fit.
        microbatches_in_flight: whose forward may wait for its backward at a time.
        degree: V; with more than one rank "gradients" works on two chunks at a time.
        scalar_loss: "gradients" needs one number to differentiate.
        device_type: "cpu" or "cuda".
        chunk_tokens, chunk_rows: the tile's sides, in place of those that the budget gives; on a
            GPU rows go by 16.
        temporaries: buffers of a tile's shape beside the logits, where plain torch works.
        triton: whether triton is installed where ``device_type`` is "cuda": without it plain torch
            works there too.

    Raises:
        ValueError: a budget below one logit, or "gradients" for a loss that is no scalar.
    """
    budget = DEFAULT_MEMORY_BUDGET if memory_budget is None else memory_budget
    kernels = triton and device_type != "cpu" and dtype != torch.float64
    size = dtype.itemsize if kernels else torch.promote_types(dtype, torch.float32).itemsize
    scratch = size if kernels else size * (1 + temporaries)  # of a logit that is worked on
    check_budget(budget, scratch)
    if backward == "gradients" and dtype == torch.float16:
        raise ValueError(
            'backward="gradients" computes gradients before it knows the scale of the loss, where '
            'those of float16 underflow: use "probs", "recompute", "auto", or bfloat16'
        )
    if backward == "gradients" and not scalar_loss:
        raise ValueError(
            'backward="gradients" computes gradients before it knows what the loss receives: it '
            'needs reduction "mean" or "sum" and no return_lse; use "probs", "recompute" or "auto"'
        )

    sizes = _Sizes(tokens, rows, hidden_size, dtype, kernels, degree, microbatches_in_flight)

    def recompute() -> BackwardPlan:
        tile = tile_shape(tokens, rows, scratch, budget, device_type)
        tile = TileShape(
            min(chunk_tokens or tile.tokens, tokens), min(chunk_rows or tile.rows, rows)
        )
        if kernels and tile.rows < rows:  # they write whole sectors, of no other tile
            tile = tile._replace(rows=min(max(tile.rows // _SECTOR, 1) * _SECTOR, rows))
        return sizes.plan("recompute", tile, 0, 0, tile.tokens * sizes.pitch(tile.rows) * scratch)

    def keeping() -> BackwardPlan:
        """Recompute, but for the rows whose logits fit."""
        plan = recompute()
        tile = plan.tile
        beside = tile.tokens * tile.rows * (scratch - size)  # what plain torch needs of a tile
        room = (budget - beside) // microbatches_in_flight // (tokens * size)
        # The buffer of the rows that are kept becomes that of a tile: it holds one, at least.
        kept = whole_tiles(room) if kernels else room // tile.rows * tile.rows
        if kept < tile.rows or kept >= rows:
            return plan
        return sizes.plan("recompute", tile, kept, tokens * sizes.pitch(kept) * size, beside)

    def probs() -> BackwardPlan:
        kept = tokens * sizes.pitch(rows) * size
        if kernels:
            return sizes.plan("probs", TileShape(tokens, rows), rows, kept, 0)
        tile = recompute().tile
        return sizes.plan("probs", tile, rows, kept, tile.tokens * tile.rows * (scratch - size))

    def gradients(chunk: int) -> BackwardPlan:
        buffers = 1 if degree == 1 or chunk >= tokens else 2
        logits = buffers * chunk * sizes.pitch(rows) * size
        return sizes.plan("gradients", TileShape(chunk, rows), 0, sizes.gradients, logits)

    def held(plan: BackwardPlan) -> int:
        return microbatches_in_flight * plan.kept_bytes + plan.logits_bytes

    if backward == "recompute":
        return recompute()
    if backward == "probs" or (backward == "auto" and held(probs()) <= budget):
        return probs()
    if scalar_loss and dtype != torch.float16:
        chunks = [min(chunk_tokens or tokens, tokens)]
        while chunk_tokens is None and chunks[-1] > _FEWEST_TOKENS:
            chunks.append(-(-chunks[-1] // 2))
        plans = [gradients(chunk) for chunk in chunks]
        if backward == "gradients":
            return next((plan for plan in plans if held(plan) <= budget), plans[-1])
        # Sums as large as another classifier count here: recomputing needs none of that size.
        for plan in plans:
            if held(plan) + plan.float32_bytes <= budget:
                return plan
    return keeping()


@dataclass(frozen=True)
class _Sizes:
    """The bytes of what a call may hold."""

    tokens: int
    rows: int
    hidden_size: int
    dtype: torch.dtype
    kernels: bool
    degree: int
    microbatches_in_flight: int

    def pitch(self, num_rows: int) -> int:
        return padded(num_rows) if self.kernels else num_rows

    @property
    def gradients(self) -> int:
        """Both gradients, in the parameters' dtype."""
        return (self.tokens + self.rows) * self.hidden_size * self.dtype.itemsize

    def plan(
        self, way: Way, tile: TileShape, kept_rows: int, kept: int, logits: int
    ) -> BackwardPlan:
        """Add up a way's float32 sums and its worst moment.

        That is the end of the work on the logits, when the hidden states' sums are complete, or
        the copy of sums to the parameters' dtype after the logits are gone.
        """
        wide = torch.promote_types(self.dtype, torch.float32).itemsize
        narrow = self.dtype.itemsize
        hidden, rows = self.tokens * self.hidden_size, self.rows * self.hidden_size
        split = tile.rows < self.rows or (self.kernels and self.rows % 8 != 0)
        if way == "gradients":
            hidden_sum = hidden * (wide if self.degree > 1 else narrow)
            sums = rows * wide if tile.tokens < self.tokens else 0
            own_rows = sums or rows * narrow
            part = tile.tokens * self.hidden_size * narrow if sums else 0
            working = logits + hidden_sum + own_rows + part
            copying = own_rows + (rows * narrow if sums else 0) + hidden * narrow
        else:
            adds = split or self.degree > 1 or not self.kernels
            hidden_sum = hidden * (wide if adds else narrow)
            sums = hidden_sum if adds else 0
            block = tile.rows * self.hidden_size * wide if tile.tokens < self.tokens else 0
            working = kept + logits + hidden_sum + rows * narrow + block
            copying = rows * narrow + hidden_sum + (hidden * narrow if adds else 0)
            sums += block
        others = (self.microbatches_in_flight - 1) * kept
        return BackwardPlan(
            way, tile, kept_rows, kept, logits, sums, others + max(working, copying)
        )


def padded(rows: int) -> int:
    """Return the distance of two tokens' logits: whole 128-byte lines, so that loads are wide."""
    return -(-rows // 64) * 64


def plan_of(
    demand: Demand,
    memory_budget: int | None,
    microbatches_in_flight: int,
    chunk_tokens: int | None,
    chunk_rows: int | None,
    *,
    triton: bool,
) -> BackwardPlan:
    """Plan a call, equally on every rank of its group.

    Ranks may hold unlike numbers of rows, but must communicate alike, so they plan for the
    largest shard of an even cut. Where that is not known, a call is not cut into pieces.
    """
    backward, tokens = demand.backward, chunk_tokens
    if demand.even_rows is None:
        backward = "recompute" if backward == "auto" else backward
        tokens = demand.tokens if backward == "gradients" else chunk_tokens
    return plan_backward(
        max(demand.tokens, 1),
        max(demand.rows if demand.even_rows is None else demand.even_rows, 1),
        demand.hidden_size,
        demand.dtype,
        backward=backward,
        memory_budget=memory_budget,
        microbatches_in_flight=microbatches_in_flight,
        degree=demand.degree,
        # What forward computed would need a pass of its own to be added up.
        scalar_loss=demand.scalar_loss and not (backward == "auto" and demand.accumulates),
        device_type="cpu" if demand.device_type == "cpu" else "cuda",
        chunk_tokens=tokens,
        chunk_rows=chunk_rows,
        temporaries=2 + demand.softcap + demand.reads("expected"),
        triton=triton,
    )
