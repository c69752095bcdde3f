"""How backward finds the logits, and in which tiles: shapes, microbatches in flight, a budget.

    backward     flops          kept between forward and backward, each microbatch in flight
    recompute    8 N D R        nothing
    probs        6 N D R        the logits [N, R] in the operands' dtype (float32 on a CPU)

"probs" turns its logits into probabilities and those into the gradient in one pass, in place. Where
"auto" has to recompute, it keeps the logits of as many rows as the budget has room for: those
take the place of the tile that the others are worked on in.

Beside the logits stand sums in float32: [N, D] of the hidden states' gradient, and a block [r, D]
of the classifier's. A long call, of many more tokens than rows, turns that round. It takes a span
of n tokens at a time, whose sum [n, D] is reduced and rounded before it is forgotten, and holds one
sum [R, D] over the spans.
"""

import functools
import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple, get_args

import torch

from vocab_parallel.statistics import accumulation_dtype

Backward = Literal["recompute", "probs"]
BACKWARDS = ("auto", *get_args(Backward))  # what a caller may ask for


class TileShape(NamedTuple):
    """A tile is at most this many tokens by this many rows."""

    tokens: int
    rows: int


# What the loss may hold beside its inputs, its two gradients and float32 sums of their size, in
# bytes. That is a tile of logits: a whole shard of them exists where it is no larger, or where the
# caller gives room for it.
DEFAULT_MEMORY_BUDGET = 64 * 2**20
# On a CPU a tile should stay in the cache between its product and the passes over it.
_CPU_TOKENS, _CPU_ROWS = 512, 2048
# A GPU's products have lost nothing to tiling at 128 MiB of bfloat16; 64 MiB are 5 to 12% slower.
_GPU_LOGITS = 2**26
# Products of whole multiples of it lose nothing at their edges.
_GPU_GRAIN = 128
# Tiles of even length would leave multiprocessors idle at the end of each product: 3840 rows of
# 8192 tokens take as long as 4096. So all tiles but the last are as long as they may be.
_GPU_TILE_GRAIN = 256
# Tiles whose operands or gradient are copied to another dtype on a GPU are no longer than this.
_COPIED = TileShape(2048, 4096)
# So many rows fill whole waves of all three products, by tiles of 128 x 256 on 132 multiprocessors
# (H100, H200); fewer of them fill 0.97 of their waves.
_GPU_WAVES, _GPU_PART_OF_WAVES = 64 * 132, 2048
# Logits of 2 bytes in 32, which kernels read and write whole.
_SECTOR = 16
# Fewer tokens at a time than this make the products of whole shards slower than tiles.
_FEWEST_TOKENS = 1024
# Calls of at most so many tokens are never long.
_LONG_CALL = 32_768
# A span reads and writes the sums [R, D] once: 3% of the time of its products. As many tokens as a
# tile of the default budget has, so that the sum [n, D] takes no more passes than in a short call.
_SPAN_TOKENS = 8192


@dataclass(frozen=True)
class BackwardPlan:
    """What a call will do and hold; the bytes are those that `memory_budget` counts.

    Attributes:
        backward: how backward finds the logits.
        tile: tokens and rows whose logits are worked on at a time.
        span: tokens whose gradient of the hidden states is summed over the group at a time: all,
            or fewer in a long call; equal on all ranks.
        kept_rows: of how many rows the logits are kept; all with "probs".
        kept_bytes: held from forward to backward, for each microbatch in flight.
        logits_bytes: of logits, while a microbatch is worked on, beside what is kept.
        float32_bytes: of float32 sums of the gradients' sizes, not counted by the budget.
        peak_bytes: held at the worst moment above inputs, both gradients and all else included.
            Hidden states [N, D] that a layout gathers are an input.
    """

    backward: Backward
    tile: TileShape
    span: int
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
    device_type: str = "cuda",
    temporaries: int = 2,
    triton: bool = True,
    has_main_grad: bool = False,
    in_spans: bool = True,
    classifier_dtype: torch.dtype | None = None,
    logits_dtype: str | None = None,
) -> BackwardPlan:
    """Tell what ``impl="chunked"`` would do for a shard, and what it would hold.

    Args:
        tokens: N, those of the loss (of all ranks in the gathering layouts).
        rows: R, of the largest shard.
        hidden_size: D.
        dtype: of hidden states, and of the classifier.
        backward: "auto", or one by name.
        memory_budget: bytes; None means 64 MiB. What is named is taken even where what it keeps
            does not fit.
        microbatches_in_flight: whose forward may wait for its backward at a time.
        degree: V, over how many ranks the rows are spread.
        device_type: "cpu" or "cuda".
        temporaries: buffers of a tile's shape beside the logits, where plain torch works.
        triton: whether triton is installed where ``device_type`` is "cuda": without it plain torch
            works there too.
        has_main_grad: whether ``accumulate_into="main_grad"`` holds the classifier's sum.
        in_spans: whether a long call may go in spans; not where all stages carry the vocabulary.
        classifier_dtype: of the classifier, where it has its own. Gradients then count as float32,
            and in ``peak_bytes`` a tile's operands do too.
        logits_dtype: as in `linear_cross_entropy`; Hopper's kernels are as without it.

    Raises:
        ValueError: a budget below one logit, a size that cannot be, or a way of backward or a dtype
            that there is not.
    """
    check_counts(0, tokens=tokens, rows=rows)
    check_counts(
        1,
        hidden_size=hidden_size,
        degree=degree,
        memory_budget=budget_bytes(memory_budget),
        microbatches_in_flight=microbatches_in_flight,
    )
    if logits_dtype not in (None, "float32"):
        raise ValueError(f'logits_dtype must be None or "float32", got {logits_dtype!r}')
    if backward not in BACKWARDS:
        raise ValueError(f"unknown backward {backward!r}: known are {list(BACKWARDS)}")
    mixed = classifier_dtype not in (None, dtype)
    product_dtype = torch.promote_types(dtype, classifier_dtype or dtype)
    planner = Planner(
        tokens=tokens,
        rows=rows,
        hidden_size=hidden_size,
        dtype=product_dtype,
        logits_dtype=accumulation_dtype(dtype) if logits_dtype else product_dtype,
        mixed=mixed,
        device_type=device_type,
        kernels=triton and device_type != "cpu" and dtype != torch.float64,
        degree=degree,
        microbatches_in_flight=microbatches_in_flight,
        budget=budget_bytes(memory_budget),
        temporaries=temporaries,
        span=span_tokens(tokens, rows, dtype, has_main_grad) if in_spans else tokens,
        has_main_grad=has_main_grad,
    )
    return planner.choose(backward)


def span_tokens(tokens: int, most_rows: int, dtype: torch.dtype, has_main_grad: bool) -> int:
    """Return how many tokens a call takes at a time: all, or a span where that holds less.

    Spans hold their own sum, that of the span before while it is reduced, and that of the rows,
    unless it is a tensor that is there anyhow: the gradient itself, or ``main_grad``. All ranks
    choose alike, by the rows of the largest shard.
    """
    there = has_main_grad or accumulation_dtype(dtype) == dtype
    held = 2 * _SPAN_TOKENS + (0 if there else most_rows)
    return _SPAN_TOKENS if tokens > max(_LONG_CALL, held) else tokens


def check_counts(least: int, **given: Any) -> None:
    """Raise ValueError for the first that is no integer of at least so many."""
    for name, value in given.items():
        if not isinstance(value, int) or value < least:
            must = "a positive integer" if least == 1 else f"an integer of at least {least}"
            raise ValueError(f"{name} must be {must}, got {value!r}")


def budget_bytes(memory_budget: int | None) -> int:
    """Return the bytes of a budget, the default's where it is None."""
    return DEFAULT_MEMORY_BUDGET if memory_budget is None else memory_budget


class Planner(NamedTuple):
    """The sizes of a call and its budget; each method plans one backward.

    Attributes are those of `plan_backward`, but for ``dtype``: that of the products;
    ``logits_dtype``: of the tiles that kernels read or keep; ``mixed``: whether operands of two
    dtypes are widened; ``kernels``: whether kernels work on the logits between the products, with
    no temporaries; ``budget``: bytes; ``span``: as `span_tokens` has it.
    """

    tokens: int
    rows: int
    hidden_size: int
    dtype: torch.dtype
    logits_dtype: torch.dtype
    mixed: bool
    device_type: str
    kernels: bool
    degree: int
    microbatches_in_flight: int
    budget: int
    temporaries: int
    span: int
    has_main_grad: bool

    def choose(self, backward: str) -> BackwardPlan:
        """Plan as `plan_backward` says."""
        check_budget(self.budget, self._scratch)
        if backward == "recompute":
            return self.recompute()
        if backward == "probs" or (backward == "auto" and self._fits(self.probs())):
            return self.probs()
        return self.keeping()

    def recompute(self) -> BackwardPlan:
        """Keep nothing."""
        tile = tile_shape(self.span, self.rows, self._scratch, self.budget, self.device_type)
        tokens, rows = tile_to_copy(tile) if self._copies else tile
        if self.kernels and rows < self.rows:  # they write whole sectors, of no other tile
            rows = min(max(rows // _SECTOR, 1) * _SECTOR, self.rows)
        logits = tokens * self._pitch(rows) * self._scratch
        return self._plan("recompute", TileShape(tokens, rows), 0, 0, logits)

    def keeping(self) -> BackwardPlan:
        """Recompute, but for the rows whose logits fit."""
        plan = self.recompute()
        tile = plan.tile
        beside = tile.tokens * tile.rows * (self._scratch - self._logit)  # plain torch's, of a tile
        room = (self.budget - beside) // self.microbatches_in_flight // (self.tokens * self._logit)
        # The buffer of the rows that are kept becomes that of a tile: it holds one, at least.
        kept = whole_tiles(room) if self.kernels else room // tile.rows * tile.rows
        if kept < tile.rows or kept >= self.rows:
            return plan
        bytes_kept = self.tokens * self._pitch(kept) * self._logit
        return self._plan("recompute", tile, kept, bytes_kept, beside)

    def probs(self) -> BackwardPlan:
        """Keep all logits."""
        kept = self.tokens * self._pitch(self.rows) * self._logit
        if self.kernels and not self._copies:
            return self._plan("probs", TileShape(self.span, self.rows), self.rows, kept, 0)
        tile = self.recompute().tile
        beside = tile.tokens * tile.rows * (self._scratch - self._logit)
        return self._plan("probs", tile, self.rows, kept, beside)

    def chunks(self) -> BackwardPlan:
        """Keep all logits of a span of tokens at a time, as many as fit, and at least some."""
        tokens = self.tokens
        plan = self.probs()
        while not self._fits(plan) and tokens > _FEWEST_TOKENS:
            tokens = -(-tokens // 2)
            plan = self._replace(tokens=tokens, span=tokens).probs()
        return plan

    @property
    def _logit(self) -> int:
        """Bytes of a logit that is kept."""
        dtype = self.logits_dtype if self.kernels else accumulation_dtype(self.dtype)
        return dtype.itemsize

    @property
    def _copies(self) -> bool:
        """Whether a GPU copies a tile's operands or its gradient to another dtype."""
        return self.device_type != "cpu" and (self.mixed or self.logits_dtype != self.dtype)

    @property
    def _scratch(self) -> int:
        """Bytes of a logit that is worked on."""
        if not self.kernels:
            return self._logit * (1 + self.temporaries)
        return self._logit + (self.dtype.itemsize if self.logits_dtype != self.dtype else 0)

    def _pitch(self, num_rows: int) -> int:
        return padded(num_rows) if self.kernels else num_rows

    def _fits(self, plan: BackwardPlan) -> bool:
        held = self.microbatches_in_flight * plan.kept_bytes + plan.logits_bytes
        return held <= self.budget

    def _plan(
        self,
        backward: Backward,
        tile: TileShape,
        kept_rows: int,
        kept: int,
        logits: int,
    ) -> BackwardPlan:
        """Add up the float32 sums and the worst moment.

        That is the end of the work on the logits, when the hidden states' sums are complete, or
        the copy of sums to the parameters' dtype after the logits are gone.
        """
        wide = accumulation_dtype(self.dtype).itemsize
        narrow = self.dtype.itemsize
        hidden, rows = self.tokens * self.hidden_size, self.rows * self.hidden_size
        split = tile.rows < self.rows or (self.kernels and self.rows % 8 != 0)
        if self.span < self.tokens:
            sums, working, copying = self._bytes_of_spans(tile)
            working += kept + logits
        else:
            adds = split or self.degree > 1 or not self.kernels
            hidden_sum = hidden * (wide if adds else narrow)
            sums = hidden_sum if adds else 0
            block = tile.rows * self.hidden_size * wide if tile.tokens < self.tokens else 0
            # Kept exponentials are multiplied by hidden states that are scaled for it.
            scaled = hidden * narrow if self.kernels and kept_rows == self.rows else 0
            working = kept + logits + hidden_sum + rows * narrow + block + scaled
            copying = rows * narrow + hidden_sum + (hidden * narrow if adds else 0)
            if self.degree > 1 and narrow < wide:
                # A rank's share is summed beside the last product, and then rounded.
                working += hidden * wide // self.degree
                copying += hidden * narrow // self.degree
            sums += block
        if self.mixed:
            working += (tile.tokens + tile.rows) * self.hidden_size * wide
        others = (self.microbatches_in_flight - 1) * kept
        return BackwardPlan(
            backward=backward,
            tile=tile,
            span=self.span,
            kept_rows=kept_rows,
            kept_bytes=kept,
            logits_bytes=logits,
            float32_bytes=sums,
            peak_bytes=others + max(working, copying),
        )

    def _bytes_of_spans(self, tile: TileShape) -> tuple[int, int, int]:
        """Return bytes: of float32 sums, held beside the logits of a span, and after the last one.

        While a span is worked on there is its sum, and over a group that of the span before, with
        the part of the reduced one that this rank gets. Afterwards the rows' sums are rounded.
        """
        wide, narrow = accumulation_dtype(self.dtype).itemsize, self.dtype.itemsize
        own = self.span * self.hidden_size * wide
        reduced = own + own // self.degree if self.degree > 1 else 0
        rows = self.rows * self.hidden_size
        row_sums = 0 if self.has_main_grad else rows * wide
        block = tile.rows * self.hidden_size * wide if tile.tokens < self.span else 0
        copied = rows * narrow if row_sums and narrow < wide else 0
        gradient = self.tokens * self.hidden_size * narrow
        sums = own + reduced + row_sums + block
        return sums, sums + gradient, row_sums + copied + gradient


@functools.lru_cache(maxsize=1024)
def chosen(planner: Planner, backward: str) -> BackwardPlan:
    """Return what `Planner.choose` does; calls of one shape are planned once."""
    return planner.choose(backward)


def tile_to_copy(tile: TileShape) -> TileShape:
    """Shrink a tile to one whose operands may be copied to another dtype, being small."""
    return TileShape(min(tile.tokens, _COPIED.tokens), min(tile.rows, _COPIED.rows))


def padded(rows: int) -> int:
    """Return the distance of two tokens' logits: whole 128-byte lines, so that loads are wide."""
    return -(-rows // 64) * 64


def tile_shape(
    num_tokens: int, num_rows: int, bytes_per_logit: int, memory_budget: int, device_type: str
) -> TileShape:
    """Choose a tile whose buffers fit in the budget.

    Args:
        num_tokens, num_rows: the plane's size.
        bytes_per_logit: of all the buffers that have a tile's shape, together.
        memory_budget: bytes.
        device_type: "cpu" or "cuda".

    Raises:
        ValueError: not even one logit fits in the budget.
    """
    check_budget(memory_budget, bytes_per_logit)
    if device_type != "cpu":
        return _gpu_tile(num_tokens, num_rows, min(memory_budget // bytes_per_logit, _GPU_LOGITS))
    tokens, rows = min(num_tokens, _CPU_TOKENS), min(num_rows, _CPU_ROWS)
    while tokens * rows * bytes_per_logit > memory_budget:
        if tokens >= rows:
            tokens = -(-tokens // 2)
        else:
            rows = -(-rows // 2)
    return TileShape(tokens, rows)


def check_budget(memory_budget: int, bytes_per_logit: int) -> None:
    """Raise ValueError where not even one logit fits in the budget."""
    if memory_budget < bytes_per_logit:
        raise ValueError(
            f"memory_budget is {memory_budget} bytes, less than the {bytes_per_logit} bytes of "
            f"one logit's buffers: give some MiB, or None for the default"
        )


def _gpu_tile(num_tokens: int, num_rows: int, logits: int) -> TileShape:
    """Choose the tile of at most so many logits that moves the fewest bytes of accumulators.

    A tile of n tokens by r rows costs 6 n r D flops, and reads and writes the float32 sums
    [n, D] of the hidden states' gradient unless it has all rows, and those [r, D] of the
    classifier's unless it has all tokens: bytes over flops go with 1 / r and 1 / n.
    """
    if num_tokens * num_rows <= logits:
        return TileShape(num_tokens, num_rows)
    side = math.isqrt(logits)
    candidates = (
        (num_tokens, logits // num_tokens),
        (logits // num_rows, num_rows),
        (side, side),
    )
    fitting = [
        TileShape(min(n, num_tokens), min(r, num_rows)) for n, r in candidates if min(n, r) > 0
    ]
    tile = min(
        fitting,
        key=lambda tile: (
            (tile.tokens < num_tokens) / tile.tokens + (tile.rows < num_rows) / tile.rows
        ),
    )
    return TileShape(_whole(num_tokens, tile.tokens), _whole(num_rows, tile.rows))


def _whole(length: int, size: int) -> int:
    """Shrink a tile's side to whole tiles of the products, unless it is all or less than one."""
    if size >= length:
        return length
    return whole_tiles(size) or size


@functools.lru_cache(maxsize=4096)
def blocks(length: int, size: int) -> tuple[slice, ...]:
    """Cut [0, length) into slices of at most ``size``."""
    return tuple(slice(start, min(start + size, length)) for start in range(0, length, size))


@functools.lru_cache(maxsize=4096)
def row_blocks(
    num_rows: int,
    size: int,
    *,
    aligned: bool,
    cut: int = 0,
    lent: tuple[int, int] | None = None,
) -> tuple[slice, ...]:
    """Cut the rows into slices of at most ``size``, none of them across ``cut``.

    cuBLAS is 2 to 3 times slower where a side of a product is no multiple of 8: where ``aligned``
    is asked for, the rows that are too many go by themselves, at the end.

    Args:
        lent: N and D, where a slice's logits [N, r] may lie in the gradient [R, D] of the rows
            after it: those slices are longer than ``size``.
    """
    main = num_rows
    if aligned and num_rows % 8:
        main = num_rows // _GPU_GRAIN * _GPU_GRAIN
    found: list[slice] = []
    for start, stop in pairwise(sorted({0, min(cut, num_rows), main, num_rows})):
        while start < stop:
            # N r logits in (R - start - r) D numbers.
            room = (num_rows - start) * lent[1] // sum(lent) if lent else 0
            end = min(start + max(size, whole_waves(room)), stop)
            found.append(slice(start, end))
            start = end
    return tuple(found)


def whole_tiles(num_rows: int) -> int:
    """Return the largest number of rows, at most so many, that a GPU's products take whole."""
    return num_rows // _GPU_TILE_GRAIN * _GPU_TILE_GRAIN


def whole_waves(num_rows: int) -> int:
    """Return a number of rows, at most so many, that leaves few multiprocessors idle."""
    grain = _GPU_WAVES if num_rows >= _GPU_WAVES else _GPU_PART_OF_WAVES
    return num_rows // grain * grain
