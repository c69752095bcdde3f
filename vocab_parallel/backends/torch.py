"""Products over tiles of the logits in plain torch: exact, any device and dtype, bounded memory.

The plane [N tokens, R rows] is cut into tiles. Rows are the outer loop and tokens the inner one,
so that a block of rows is read once and its gradient is written once, and only the [N, D] partial
gradient of the hidden states, which is summed over the group in float32 anyway, is accumulated at
full size. A GPU's tile has all tokens unless the budget is tiny, and more rows than the budget has
room for while the part of the classifier's gradient that is still to be written can hold them.

    statistics   for each tile   z = e c^T                        2 N D R flops, one pass over z
    gradients    for each tile   z again, or the forward's        2 N D R, or none
                                 g in place of z                  one pass
                                 dE[tokens] += g c                2 N D R
                                 dC_block   += g^T e              2 N D R

`plan.py` chooses between making z again and keeping it. What is done with a tile are methods of
their own, which `triton.py`, `hopper.py` and a distillation replace.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from vocab_parallel.backends.interface import Gradients, Kept, Shard, Upstream
from vocab_parallel.plan import (
    BackwardPlan,
    Planner,
    TileShape,
    blocks,
    budget_bytes,
    check_counts,
    chosen,
    row_blocks,
    span_tokens,
)
from vocab_parallel.statistics import count_lines, join, lines_of, names_of

# In how many parts the tokens go where a pass cannot work in place.
_PARTS = 4


class Block(NamedTuple):
    """Some rows of a shard, in the dtypes that products and passes take them in.

    Attributes:
        shard: whose rows they are.
        rows: which.
        classifier: [r, D].
        bias: [r], or None.
    """

    shard: Shard
    rows: slice
    classifier: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class TorchBackend:
    """Exact, in memory that does not grow with the vocabulary unless it may.

    Attributes:
        memory_budget: bytes; see `plan_backward`.
        microbatches_in_flight: how many forwards may wait for their backward, for the choice.
    """

    memory_budget: int | None = None
    microbatches_in_flight: int = 1

    kernels: ClassVar[bool] = False
    # What gradients are brought to where float16 could not hold them.
    peak: ClassVar[float] = 2.0**10

    def __post_init__(self) -> None:
        check_counts(
            1,
            memory_budget=budget_bytes(self.memory_budget),
            microbatches_in_flight=self.microbatches_in_flight,
        )

    def plan(
        self,
        shard: Shard,
        *,
        tokens: int,
        most_rows: int | None,
        degree: int,
        backward: str,
        has_main_grad: bool = False,
    ) -> BackwardPlan:
        """See `Backend.plan`.

        Where the size of the vocabulary is not known, ranks cannot plan alike, and no call is
        long.
        """
        span = max(tokens, 1)
        if most_rows is not None:
            span = span_tokens(span, most_rows, shard.hidden.dtype, has_main_grad)
        if not self._may_keep(shard):
            if backward == "probs":
                raise ValueError(
                    f'logits_dtype="float32" with backward="probs" keeps logits in '
                    f"{shard.hidden.dtype} on a GPU, unless they are bfloat16 and the loss has "
                    f'neither label_smoothing nor an entropy: use "recompute" or "auto"'
                )
            backward = "recompute"
        return chosen(self._planner(shard, max(tokens, 1), degree, span, has_main_grad), backward)

    def plan_chunks(self, shard: Shard, tokens: int) -> BackwardPlan:
        """Plan for logits of all rows that live for a span of the tokens at a time.

        Whoever needs statistics and gradient of some tokens before the next ones, as
        `pipeline/spanning` does, makes their logits once.
        """
        alone = replace(self, microbatches_in_flight=1)
        return alone._planner(shard, max(tokens, 1), 1, max(tokens, 1), False).chunks()

    def statistics(self, shard: Shard, plan: BackwardPlan) -> tuple[Tensor, Kept | None]:
        """See `Backend.statistics`."""
        num_tokens, num_rows = shard.hidden.shape[0], shard.classifier.shape[0]
        num_kept = rows_to_keep(shard, plan)
        found = shard.hidden.new_empty((count_lines(shard.columns), num_tokens), dtype=shard.dtype)
        tile = self._tile(shard, plan, num_kept == num_rows)
        row_slices = row_blocks(num_rows, tile.rows, aligned=self.kernels, cut=num_kept)
        buffer = self.buffer(shard, TileShape(num_tokens, num_kept) if num_kept else tile)
        # Rows that are not kept come first: what is kept may have the buffer after them.
        later = [rows for rows in row_slices if rows.stop <= num_kept]
        row_slices = (*row_slices[len(later) :], *later)
        for rows in row_slices:
            block = self.block(shard, rows)
            stays = rows.stop <= num_kept
            for tokens in blocks(num_tokens, tile.tokens):
                logits = buffer[tokens, rows] if stays else corner(buffer, tokens, rows)
                self.put_raw_logits(logits, block, tokens)
                if stays and not self.kernels:  # which only read them
                    logits = logits.clone()
                first = rows is row_slices[0]
                self.add_statistics(found[:, tokens], logits, block, tokens, first=first)
        return found, Kept(buffer, num_kept, None) if num_kept else None

    def gradients(self, shard: Shard, plan: BackwardPlan, upstream: Upstream) -> Gradients:
        """See `Backend.gradients`."""
        num_tokens, num_rows = shard.hidden.shape[0], shard.classifier.shape[0]
        source = _GradientTiles(self, shard, plan, upstream)
        tile, scale, into = source.tile, source.scale, upstream.classifier_grad
        token_slices = blocks(num_tokens, tile.tokens)
        # One tile of all tokens: its product writes or adds to the destination.
        direct = len(token_slices) == 1 and scale is None and not shard.mixed
        classifier_grad = allocate_classifier_grad(shard, upstream)
        lends = self.kernels and direct and source.borrows(classifier_grad)
        row_slices = row_blocks(
            num_rows,
            tile.rows,
            aligned=self.kernels,
            cut=source.num_kept,
            lent=tuple(shard.hidden.shape) if lends else None,
        )
        at_once = len(row_slices) == 1 and scale is None
        hidden_grad = allocate_hidden_grad(shard, at_once) if upstream.wanted.hidden else None
        bias_grad = allocate_bias_grad(shard, upstream)
        for rows in row_slices:
            block, sums = self.block(shard, rows), None
            for tokens in token_slices:
                logits_grad, over_tokens = source.make(block, tokens)
                if hidden_grad is not None:
                    part = hidden_grad[tokens]
                    put_product(part, logits_grad, block.classifier, add=rows.start > 0)
                    is_last = rows is row_slices[-1] and tokens is token_slices[-1]
                    if is_last and upstream.when_hidden is not None and scale is None:
                        upstream.when_hidden(hidden_grad)
                if bias_grad is not None and over_tokens is not None:
                    bias_grad[rows] += over_tokens
                if classifier_grad is None:
                    continue
                hidden, add = self.widened(shard.hidden[tokens], shard), sums is not None
                if direct:
                    destination, add = classifier_grad[rows], into.add_to is not None
                else:
                    if sums is None:
                        sums = hidden.new_empty(classifier_grad[rows].shape, dtype=shard.dtype)
                    destination = sums
                put_product(destination, logits_grad.T, hidden, add=add)
            if sums is not None and classifier_grad is not None:
                sums = sums if scale is None else sums.mul_(scale)
                ready = classifier_grad[rows]
                ready.copy_(sums) if into.add_to is None else ready.add_(sums)
        if scale is not None:
            for gradient in (hidden_grad, bias_grad):
                if gradient is not None:
                    gradient.mul_(scale)
        return Gradients(hidden_grad, classifier_grad, bias_grad)

    # What is done with a tile.

    def block(self, shard: Shard, rows: slice) -> Block:
        """Cut a block of rows out of a shard."""
        bias = None if shard.bias is None else shard.bias[rows].to(shard.dtype)
        return Block(shard, rows, self.widened(shard.classifier[rows], shard), bias)

    def widened(self, operand: Tensor, shard: Shard) -> Tensor:
        """Return a tile's operand in the dtype in which its device multiplies it."""
        return operand.to(shard.operand_dtype)

    def buffer(self, shard: Shard, tile: TileShape) -> Tensor:
        """Allocate a tile's raw logits [tokens, rows]."""
        return shard.hidden.new_empty(tile, dtype=shard.dtype)

    def put_raw_logits(self, out: Tensor, block: Block, tokens: slice) -> Tensor:
        """Compute a tile of raw logits into ``out`` [n, r]."""
        hidden = self.widened(block.shard.hidden[tokens], block.shard)
        put_product(out, hidden, block.classifier.T, add=False)
        return out

    def add_statistics(
        self, found: Tensor, logits: Tensor, block: Block, tokens: slice, *, first: bool
    ) -> None:
        """Join the statistics of a tile with those of the tiles before it, if there are any.

        Args:
            found: [k, n] of these tokens, of the rows before this tile; updated.
            logits: [n, r], raw; may be overwritten.
            first: whether nothing that ``found`` holds counts.
        """
        own = self.tile_statistics(finish_logits_(logits, block), block, tokens)
        columns = block.shard.columns
        found.copy_(own if first else join(torch.stack((found, own)), columns))

    def tile_statistics(self, logits: Tensor, block: Block, tokens: slice) -> Tensor:
        """Return the statistics [k, n] of a tile's logits [n, r], which are overwritten."""
        names = names_of(block.shard.columns)
        targets = block.shard.targets[tokens]
        inside, index = owned_targets(targets - block.rows.start, logits.shape[1])
        at = index.unsqueeze(1)
        at_target = logits.gather(1, at).squeeze(1)
        made = {"target": torch.where(inside, at_target, 0.0)}
        if "sum" in names:
            made["sum"] = logits.sum(1)
        if "largest_other" in names:
            nothing = torch.where(inside, -torch.inf, at_target)
            made["largest_other"] = others = logits.scatter_(1, at, nothing.unsqueeze(1)).amax(1)
            logits.scatter_(1, at, at_target.unsqueeze(1))
            largest = torch.where(inside, torch.maximum(others, at_target), others)
        else:
            largest = logits.amax(1)
        # A row of -inf alone (a bias may mask rows so) must not give -inf - -inf.
        largest = largest.clamp(min=torch.finfo(logits.dtype).min)
        logits.sub_(largest.unsqueeze(1))
        # A logit of -inf has no probability, and adds nothing to the mean: not 0 times -inf.
        values = logits.masked_fill(logits == -torch.inf, 0.0) if "mean_log_prob" in names else None
        exponentials = logits.exp_()
        total = exponentials.sum(1)
        made["lse"] = lse = total.log().add_(largest)
        if values is not None:
            mean = values.mul_(exponentials).sum(1).div_(total.masked_fill(total == 0.0, 1.0))
            made["mean_log_prob"] = mean.sub_(lse - largest).masked_fill_(total == 0.0, 0.0)
        return torch.stack([made[name] for name in names])

    def put_gradient(
        self, out: Tensor, block: Block, tokens: slice, upstream: Upstream, logits: Tensor | None
    ) -> Tensor | None:
        """Write the gradient of a tile of raw logits; return its sum over tokens [r] for a bias.

        Args:
            out: [n, r], written; may be the logits.
            upstream: of all tokens.
            logits: [n, r], raw, that forward kept; None makes them again.
        """
        if logits is None:
            logits = self.put_raw_logits(out, block, tokens)
        if out is not logits:
            out.copy_(logits)
        finish_logits_(out, block)
        cap, temperature = block.shard.transform
        capped = None if cap is None else out * (temperature / cap)
        statistics, grads = upstream.statistics[:, tokens], upstream.grads[:, tokens]
        self.put_logits_gradient(out, block, tokens, statistics, grads)
        if capped is not None:  # d tanh = 1 - tanh^2
            out.addcmul_(out, capped.square_(), value=-1.0)
        if temperature != 1.0:
            out.div_(temperature)
        return out.sum(0) if upstream.wanted.bias else None

    def put_logits_gradient(
        self, logits: Tensor, block: Block, tokens: slice, statistics: Tensor, grads: Tensor
    ) -> None:
        """Put the gradient of a tile's logits [n, r] in their place; `interface.py` has it.

        Args:
            logits: [n, r], capped and divided.
            statistics, grads: [k, n].
        """
        shard = block.shard
        lines = lines_of(shard.grad_columns)
        lse, target, factor = statistics[0], statistics[1], grads[0]
        at_target = factor * torch.expm1(target - lse) + (factor + grads[1])
        logits.sub_(lse.unsqueeze(1))
        factor = factor.unsqueeze(1)
        if "mean_log_prob" in lines:
            mean, mean_grad = (each[lines["mean_log_prob"]].T for each in (statistics, grads))
            # No probability, no gradient: not 0 times -inf.
            finite = logits.masked_fill(logits == -torch.inf, 0.0)
            factor = finite.sub_(mean).mul_(mean_grad).add_(factor)
            log_p = target - lse
            beyond = log_p.masked_fill(target == -torch.inf, 0.0) - mean.squeeze(1)
            at_target += mean_grad.squeeze(1) * log_p.exp() * beyond
        gradient = logits.exp_().mul_(factor)
        inside, index = owned_targets(shard.targets[tokens] - block.rows.start, logits.shape[1])
        at = index.unsqueeze(1)
        entry = torch.where(inside.unsqueeze(1), at_target.unsqueeze(1), gradient.gather(1, at))
        gradient.scatter_(1, at, entry)
        if "sum" in lines:
            gradient.add_(grads[lines["sum"]].T)

    def gradient_of_kept(
        self, values: Tensor, reference: Tensor, shard: Shard, upstream: Upstream
    ) -> Tensor | None:
        """Turn exponentials of the first rows into their gradient; only `hopper.py` keeps them."""
        raise AssertionError(f"{type(self).__name__} keeps logits")

    # What plans ask.

    def tile_dtype(self, shard: Shard) -> torch.dtype:
        """Return the dtype of logits that are in memory, where kernels work."""
        return shard.logits_dtype

    def temporaries(self, shard: Shard) -> int:
        """Return how many buffers of a tile's shape plain torch holds beside the logits."""
        lines = lines_of(shard.columns)
        return 2 + (shard.transform.softcap is not None) + ("mean_log_prob" in lines)

    def _may_keep(self, shard: Shard) -> bool:
        """Tell whether what forward keeps is as exact as the logits are asked to be.

        It is equal on all ranks, so that it does not ask which kernels work: Hopper's keep
        exponentials of float32 logits where they can, else logits in the operands' dtype.
        """
        if shard.mixed or shard.logits_dtype == shard.product_dtype or not self.kernels:
            return True
        plain = names_of(shard.grad_columns) == ("lse", "target")
        return shard.hidden.dtype == torch.bfloat16 and plain

    def _planner(
        self, shard: Shard, tokens: int, degree: int, span: int, has_main_grad: bool
    ) -> Planner:
        return Planner(
            tokens=tokens,
            rows=max(shard.classifier.shape[0], 1),
            hidden_size=shard.hidden.shape[1],
            dtype=shard.product_dtype,
            logits_dtype=self.tile_dtype(shard),
            mixed=shard.mixed,
            device_type=shard.hidden.device.type,
            kernels=self.kernels,
            degree=degree,
            microbatches_in_flight=self.microbatches_in_flight,
            budget=budget_bytes(self.memory_budget),
            temporaries=self.temporaries(shard),
            span=span,
            has_main_grad=has_main_grad,
        )

    def _tile(self, shard: Shard, plan: BackwardPlan, keeps: bool) -> TileShape:
        """Return the tile of this rank's own work; kernels take kept logits whole if they can."""
        num_tokens, num_rows = shard.hidden.shape[0], shard.classifier.shape[0]
        # A tile whose operands or gradient are copied to another dtype stays small.
        if (
            keeps
            and self.kernels
            and not shard.mixed
            and self.tile_dtype(shard) == shard.product_dtype
        ):
            return TileShape(num_tokens, num_rows)
        return TileShape(min(plan.tile.tokens, num_tokens), min(plan.tile.rows, num_rows))


class _GradientTiles:
    """Makes the gradient of one tile of raw logits after the other.

    The forward's logits are turned into it in place, where they were kept. The inputs' half of a
    split backward must leave them to the weights' half, and works in parts of the tokens, beside
    them. Where there are none, the product makes them again; where there are those of the first
    rows alone, in the place of those, once they are done.

    Attributes:
        num_kept: of how many rows something was kept.
        tile: that is worked on at a time.
        scale: what the products are to be multiplied by, or None.
    """

    def __init__(
        self, backend: TorchBackend, shard: Shard, plan: BackwardPlan, upstream: Upstream
    ) -> None:
        kept: Kept | None = upstream.kept
        wanted = upstream.wanted
        self._backend = backend
        self.num_kept = 0 if kept is None else kept.num_rows
        whole = self.num_kept == shard.classifier.shape[0]
        # A part of the logits saves one half of a split backward its product: the first to come.
        self._pops = wanted.classifier or wanted.bias or not whole
        self._kept: Tensor | None = None
        if kept is not None:
            self._kept = kept.pop() if self._pops else kept.values
        self.tile = backend._tile(shard, plan, whole and self._kept is not None)
        self._scratch: Tensor | None = None
        self._lender: Tensor | None = None
        if self._kept is None or not self._pops:
            if self._kept is not None:
                most = min(-(-shard.hidden.shape[0] // _PARTS), self.tile.tokens)
                self.tile = TileShape(most, self.tile.rows)
            self._scratch = backend.buffer(shard, self.tile)
        elif not whole:
            self._scratch = self._kept
        grads, self.scale = well_scaled(upstream.grads, shard.product_dtype, peak=backend.peak)
        self._upstream = upstream._replace(grads=grads)
        # Exponentials of some rows become gradients at once: all others are made as such.
        self._is_gradient = False
        self._kept_sums: Tensor | None = None  # [r], of tokens
        if kept is not None and self._kept is not None and kept.reference is not None:
            values = self._kept[:, : self.num_kept]
            self._kept_sums = backend.gradient_of_kept(values, kept.reference, shard, upstream)
            self._is_gradient = True

    def borrows(self, classifier_grad: Tensor | None) -> bool:
        """Tell whether tiles may lie in the part of the classifier's gradient still to be written.

        They are of all tokens. Longer products run nearer to the device's peak, and the sums of
        the hidden states' gradient are read and written less often.
        """
        if self._scratch is None or classifier_grad is None:
            return False
        fresh = self._upstream.classifier_grad.add_to is None
        if fresh and classifier_grad.dtype == self._scratch.dtype:
            self._lender = classifier_grad
        return self._lender is not None

    def _room(self, tokens: slice, rows: slice) -> Tensor:
        """Return where a tile's gradient [n, r] is made."""
        assert self._scratch is not None
        num_rows = rows.stop - rows.start
        if self._lender is None or num_rows <= self._scratch.shape[1]:
            return corner(self._scratch, tokens, rows)
        count = tokens.stop - tokens.start
        rest = self._lender[rows.stop :].view(-1)
        return rest[: count * num_rows].view(count, num_rows)

    def make(self, block: Block, tokens: slice) -> tuple[Tensor, Tensor | None]:
        """Return a tile's gradient [n, r], until the next call, and its sum over tokens [r]."""
        logits, rows = None, block.rows
        if self._kept is not None and rows.stop <= self.num_kept:
            logits = self._kept[tokens, rows]
        if logits is not None and self._is_gradient:
            # The sums are over all tokens already: they go with the first of them.
            if self._kept_sums is None or tokens.start > 0:
                return logits, None
            return logits, self._kept_sums[rows]
        out = logits if logits is not None and self._pops else self._room(tokens, rows)
        sums = self._backend.put_gradient(out, block, tokens, self._upstream, logits)
        # The logits may be wider than the operands, as they are where no kernel works.
        return out.to(block.classifier.dtype), sums


def rows_to_keep(shard: Shard, plan: BackwardPlan) -> int:
    """Return of how many of the first rows forward keeps the logits, at most as planned."""
    if not shard.needs_grad:
        return 0
    num_rows = shard.classifier.shape[0]
    return num_rows if plan.backward == "probs" else min(plan.kept_rows, num_rows)


def allocate_hidden_grad(shard: Shard, at_once: bool) -> Tensor:
    """Allocate the partial gradient [N, D]: in its own dtype where one product finishes it."""
    one_dtype = shard.sum_dtype == shard.hidden.dtype == shard.product_dtype
    own = at_once and shard.hidden.is_cuda and one_dtype
    return torch.empty_like(
        shard.hidden,
        dtype=shard.sum_dtype if own else shard.dtype,
        memory_format=torch.contiguous_format,
    )


def allocate_classifier_grad(shard: Shard, upstream: Upstream) -> Tensor | None:
    """Return where the classifier's gradient [R, D] goes, or None where it is not wanted."""
    if not upstream.wanted.classifier:
        return None
    into = upstream.classifier_grad
    if into.add_to is not None:
        return into.add_to
    return shard.classifier.new_empty(shard.classifier.shape, dtype=into.dtype)


def allocate_bias_grad(shard: Shard, upstream: Upstream) -> Tensor | None:
    """Allocate the bias's gradient [R], zeros, or return None where it is not wanted."""
    if not upstream.wanted.bias or shard.bias is None:
        return None
    return shard.bias.new_zeros(shard.bias.shape, dtype=shard.dtype)


def corner(buffer: Tensor, tokens: slice, rows: slice) -> Tensor:
    """Return the part of a tile's buffer that some tokens and rows need."""
    return buffer[: tokens.stop - tokens.start, : rows.stop - rows.start]


def put_product(destination: Tensor, a: Tensor, b: Tensor, *, add: bool) -> None:
    """Write a @ b to ``destination``, or add it to what is there, in one product.

    Accumulates in float32 or wider and rounds once, to the destination's dtype. On a GPU float32
    operands are multiplied as torch is told to: without TF32, unless it is allowed.
    """
    if a.dtype == destination.dtype:
        if add:
            destination.addmm_(a, b)
        else:
            torch.mm(a, b, out=destination)
    elif not a.is_cuda:  # a and b are wider; a @ b would be rounded under autocast
        found = torch.mm(a, b, out=a.new_empty(a.shape[0], b.shape[1]))
        destination.copy_(found.add_(destination) if add else found)
    elif add:
        torch.addmm(destination, a, b, out_dtype=destination.dtype, out=destination)
    else:
        torch.mm(a, b, out_dtype=destination.dtype, out=destination)


def well_scaled(
    grads: Tensor, product_dtype: torch.dtype, *, peak: float
) -> tuple[Tensor, Tensor | None]:
    """Bring gradients to at most ``peak`` where they enter a product of float16 on a GPU.

    The small numbers of float16 end at 6e-8: a probability over a token count would underflow.
    The returned scale multiplies the product's result; None where nothing was scaled.
    """
    if product_dtype != torch.float16 or not grads.is_cuda:
        return grads, None
    scale = grads.abs().amax().clamp(min=torch.finfo(grads.dtype).tiny) / peak
    return grads / scale, scale


def owned_targets(targets: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Return which targets lie in [0, num_rows), and int64 rows that are safe for all."""
    owned = (targets >= 0) & (targets < num_rows)
    return owned, targets.long().clamp(0, num_rows - 1)


def finish_logits_(logits: Tensor, block: Block) -> Tensor:
    """Turn a tile of raw logits into logits, in place."""
    cap, temperature = block.shard.transform
    if block.bias is not None:
        logits.add_(block.bias)
    if cap is not None:
        logits.div_(cap).tanh_().mul_(cap)
    if temperature != 1.0:
        logits.div_(temperature)
    return logits
