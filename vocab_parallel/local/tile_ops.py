"""Every operation on a tile of logits, and the one choice of who does them.

    TileOps      plain torch: any device and dtype
    TritonOps    cuBLAS products, Triton's passes between them: CUDA, at most float32
    HopperOps    the product and what follows it in one kernel: half precision on Hopper

All do the same, and tests compare them. A raw logit is the product's entry; with the bias added,
capped and divided it is a logit. Where kernels work a tile is raw and in the operands' dtype, and
they do the rest where they read it, once, holding nothing of its size. In one kernel with the
product it is float32 in registers: nothing is rounded before its exponential, and nothing is moved.
"""

import functools
import importlib.util
from dataclasses import dataclass

import torch
from torch import Tensor

from vocab_parallel.local.backward_plan import TileShape, blocks, padded
from vocab_parallel.local.interface import Shard, owned_targets
from vocab_parallel.local.statistics import Statistics, join_means

_HOPPER = 9


def choose(hidden: Tensor, classifier: Tensor) -> "TileOps":
    """Choose who works on the tiles of hidden states [N, D] and rows [R, D], once a call.

    It asks for device, dtype, the packages that are there and, for Hopper's kernels, addresses
    that TMA can read. Tests put another choice in this function's place.
    """
    if not hidden.is_cuda or hidden.dtype == torch.float64 or not has_triton():
        return TileOps()
    half = hidden.dtype in (torch.float16, torch.bfloat16) and classifier.dtype == hidden.dtype
    if half and _has_hopper_kernels(hidden.device):
        from vocab_parallel.kernels.product import operands_fit

        # Hidden states that are gathered lie without gaps in memory of their own.
        gathered = hidden.shape[1] * hidden.element_size() % 16 == 0
        if gathered and operands_fit(hidden, classifier):
            return HopperOps()
    return TritonOps()


@functools.cache
def has_triton() -> bool:
    """Tell whether triton is installed; it is not for every system that has CUDA."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _has_hopper_kernels(device: torch.device) -> bool:
    if torch.cuda.get_device_capability(device)[0] != _HOPPER:
        return False
    return importlib.util.find_spec("triton.tools.tensor_descriptor") is not None


@dataclass(frozen=True)
class Block:
    """Some rows of a shard, in the dtypes that products and passes take them in.

    Attributes:
        shard: whose rows they are.
        start: the first row.
        classifier: [r, D].
        bias: [r], or None.
    """

    shard: Shard
    start: int
    classifier: Tensor
    bias: Tensor | None


class TileOps:
    """Plain torch.

    Attributes:
        kernels: whether Triton's kernels do the work between the products.
    """

    kernels = False

    def widened(self, operand: Tensor, shard: Shard) -> Tensor:
        """Return a tile's operand in the dtype in which its device multiplies it.

        Operands of two dtypes go in float32 everywhere; see also the function `widened`.
        """
        return widened(operand.to(shard.product_dtype), shard.dtype)

    def copies(self, shard: Shard) -> bool:
        """Tell whether a tile's operands or its gradient are copied to another dtype."""
        return shard.mixed or shard.logits_dtype != shard.product_dtype

    def block(self, shard: Shard, rows: slice) -> Block:
        """Cut a block of rows out of a shard."""
        return Block(
            shard,
            rows.start,
            self.widened(shard.classifier[rows], shard),
            None if shard.bias is None else shard.bias[rows].to(shard.dtype),
        )

    def buffer(self, shard: Shard, tile: TileShape) -> Tensor:
        """Allocate a tile's raw logits [tokens, rows]."""
        return shard.hidden.new_empty(tile, dtype=shard.dtype)

    def put_raw_logits(self, out: Tensor, block: Block, tokens: slice) -> Tensor:
        """Compute a tile of raw logits into ``out`` [n, r]."""
        hidden = self.widened(block.shard.hidden[tokens], block.shard)
        put_product(out, hidden, block.classifier.T, add=False)
        return out

    def add_statistics(
        self,
        found: Statistics,
        logits: Tensor,
        block: Block,
        tokens: slice,
        *,
        first: bool,
        keep: bool,
    ) -> None:
        """Join the statistics of a tile with those of the tiles before it, if there are any.

        Args:
            found: [k, n] of these tokens, of the rows before this tile; updated.
            logits: [n, r], raw.
            first: whether nothing that ``found`` holds counts.
            keep: whether the logits must stay as they are.
        """
        if first:
            found.clear_()
        logits = finish_logits_(logits.clone() if keep else logits, block)
        inside, index = owned_targets(block.shard.targets[tokens] - block.start, logits.shape[1])
        at_target = logits.gather(1, index.unsqueeze(1)).squeeze(1)
        found.target.add_(torch.where(inside, at_target, 0.0))
        if "sum" in found:
            found.sum.add_(logits.sum(1))

        if "rival" in found:
            at, nothing = index.unsqueeze(1), torch.where(inside, -torch.inf, at_target)
            others = logits.scatter_(1, at, nothing.unsqueeze(1)).amax(1)
            torch.maximum(found.rival, others, out=found.rival)
            logits.scatter_(1, at, at_target.unsqueeze(1))
            largest = torch.where(inside, torch.maximum(others, at_target), others)
        else:
            largest = logits.amax(1)
        # A row of -inf alone (a bias may mask rows so) must not give -inf - -inf.
        largest.clamp_(min=torch.finfo(logits.dtype).min)
        logits.sub_(largest.unsqueeze(1))
        # A logit of -inf has no probability, and adds nothing to the mean: not 0 times -inf.
        values = logits.masked_fill(logits == -torch.inf, 0.0) if "expected" in found else None
        exponentials = logits.exp_()
        total = exponentials.sum(1)
        lse = total.log().add_(largest)
        joined = torch.logaddexp(found.lse, lse)
        if values is not None:
            expected = values.mul_(exponentials).sum(1).div_(total.masked_fill(total == 0.0, 1.0))
            expected.sub_(lse - largest)
            both = torch.stack((found.expected, expected)), torch.stack((found.lse, lse))
            found.expected.copy_(join_means(*both, joined))
        found.lse.copy_(joined)

    def put_gradient(
        self,
        out: Tensor,
        block: Block,
        tokens: slice,
        statistics: Statistics,
        grads: Statistics,
        *,
        logits: Tensor | None,
        sum_tokens: bool,
    ) -> Tensor | None:
        """Write the gradient of a tile of raw logits; return its sum over tokens [r] where asked.

        Args:
            out: [n, r], written; may be the logits.
            statistics, grads: [k, N] of all tokens.
            logits: [n, r], raw, that forward kept; None makes them again.
            sum_tokens: whether the bias wants that sum.
        """
        if logits is None:
            logits = self.put_raw_logits(out, block, tokens)
        if out is not logits:
            out.copy_(logits)
        targets = block.shard.targets[tokens] - block.start
        _gradient_in_place(out, block, targets, statistics.of(tokens), grads.of(tokens))
        return out.sum(0) if sum_tokens else None

    def scale_(self, tensor: Tensor, factor: Tensor) -> Tensor:
        """Multiply in place by a number of the device."""
        return tensor.mul_(factor)


class TritonOps(TileOps):
    """cuBLAS products, and kernels that read or rewrite a tile once between them."""

    kernels = True

    def buffer(self, shard: Shard, tile: TileShape) -> Tensor:
        """Allocate raw logits [tokens, at least rows], tokens a whole number of lines apart."""
        shape = (tile.tokens, padded(tile.rows))
        return shard.hidden.new_empty(shape, dtype=shard.logits_dtype)

    def add_statistics(
        self,
        found: Statistics,
        logits: Tensor,
        block: Block,
        tokens: slice,
        *,
        first: bool,
        keep: bool,
    ) -> None:
        """See `TileOps.add_statistics`."""
        from vocab_parallel.kernels.logits_statistics import logits_statistics

        shard = block.shard
        targets = shard.targets[tokens]
        logits_statistics(
            logits, block.bias, targets, block.start, found.values, found.names, shard.transform,
            first=first,
        )  # fmt: skip

    def put_gradient(
        self,
        out: Tensor,
        block: Block,
        tokens: slice,
        statistics: Statistics,
        grads: Statistics,
        *,
        logits: Tensor | None,
        sum_tokens: bool,
    ) -> Tensor | None:
        """See `TileOps.put_gradient`."""
        from vocab_parallel.kernels.logits_gradient import logits_gradient

        if logits is None:
            logits = self.put_raw_logits(out, block, tokens)
        shard = block.shard
        return logits_gradient(
            logits, block.bias, shard.targets[tokens], block.start, statistics.of(tokens).values,
            grads.of(tokens).values, statistics.names, out, shard.transform, sum_tokens=sum_tokens,
        )  # fmt: skip

    def scale_(self, tensor: Tensor, factor: Tensor) -> Tensor:
        """Multiply in place by a number of the device; a kernel does nothing where it is 1."""
        if not tensor.is_contiguous():
            return tensor.mul_(factor)
        from vocab_parallel.kernels.scaling import scale_

        return scale_(tensor, factor)


class HopperOps(TritonOps):
    """The product and what follows it in one kernel, where logits are made.

    They are float32 there, whatever ``logits_dtype`` is; what is kept is not.
    """

    def copies(self, shard: Shard) -> bool:
        """Nothing is: operands have one dtype, and gradients are written in it."""
        return False

    def buffer(self, shard: Shard, tile: TileShape) -> Tensor:
        """See `TritonOps.buffer`; in the operands' dtype."""
        return shard.hidden.new_empty((tile.tokens, padded(tile.rows)))

    def reference(self, shard: Shard) -> Tensor | None:
        """Return a number near each token's largest logits [N], or None where none is of use.

        It is the largest of some of the shard's rows. Whatever it is the results are right; the
        farther it lies from a token's lse, the more of its logits are done twice.
        """
        if shard.grad_names != ("lse", "target"):
            return None
        from vocab_parallel.kernels.reference import token_reference

        return token_reference(shard.hidden, shard.classifier, shard.bias, shard.transform)

    def keeps_probabilities(self, shard: Shard) -> bool:
        """Tell whether forward keeps exponentials; float16 has no room for them."""
        return shard.hidden.dtype == torch.bfloat16

    def put_statistics(
        self,
        found: Statistics,
        shard: Shard,
        reference: Tensor | None,
        kept: Tensor | None,
        memory: int,
    ) -> None:
        """Write all tokens' statistics of all rows, within some bytes of memory.

        Args:
            found: [k, N], written.
            reference: [N], that of `reference`; with None, or for a dtype that does not keep
                exponentials, what is kept are raw logits.
            kept: [N, r]; what is kept of the first rows, written; or None.
            memory: bytes for what is held of tokens until their statistics are joined.
        """
        from vocab_parallel.kernels.product import TOKENS
        from vocab_parallel.kernels.product_probabilities import product_probabilities
        from vocab_parallel.kernels.product_statistics import bytes_a_token, product_statistics

        most = memory // bytes_a_token(shard.num_rows, found.names)
        for part in _evenly(shard.num_tokens, most, TOKENS):
            operands = (shard.hidden[part], shard.classifier, shard.bias, shard.targets[part])
            values = found.of(part).values
            own = None if kept is None else kept[part]
            if reference is not None and (kept is None or self.keeps_probabilities(shard)):
                product_probabilities(
                    *operands, reference[part], values, found.names, own, shard.transform
                )
            else:
                product_statistics(*operands, values, found.names, own, shard.transform)

    def settle(
        self,
        kept: Tensor,
        reference: Tensor,
        shard: Shard,
        statistics: Statistics,
        grads: Statistics,
    ) -> tuple[Tensor, Tensor]:
        """Make kept exponentials [N, r] of the first rows ready for products.

        Returns each token's scale [N], and what its target's entry receives [N], whose place
        becomes 0; see `kernels/kept_probabilities.py`.
        """
        from vocab_parallel.kernels.kept_probabilities import settle

        rows = slice(0, kept.shape[1])
        bias = None if shard.bias is None else shard.bias[rows]
        return settle(
            kept, shard.hidden, shard.classifier[rows], bias, shard.targets, reference,
            statistics.values, grads.values, shard.transform,
        )  # fmt: skip

    def add_to_target_rows(
        self, matrix: Tensor, values: Tensor, weight: Tensor, targets: Tensor
    ) -> None:
        """Add tokens' values [N, m], times their weights [N], to their targets' rows [R, m]."""
        from vocab_parallel.kernels.target_rows import add_to_target_rows

        add_to_target_rows(matrix, values, weight, targets)

    def add_target_rows(
        self,
        sums: Tensor,
        scale: Tensor,
        rows: Tensor,
        weight: Tensor,
        targets: Tensor,
        out: Tensor,
    ) -> None:
        """Write tokens' sums [N, m] times their scales [N], with their targets' rows of [R, m].

        Those count by the tokens' weights [N].
        """
        from vocab_parallel.kernels.target_rows import add_target_rows

        add_target_rows(sums, scale, rows, weight, targets, out)

    def scale_tokens(
        self,
        matrix: Tensor,
        scale: Tensor,
        out: Tensor,
        at_targets: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Write each token's numbers [N, m] times its scale [N] to ``out``, and return it.

        Args:
            at_targets: columns [N], and what is written there instead [N].
        """
        from vocab_parallel.kernels.scaling import scale_tokens

        return scale_tokens(matrix, scale, out, at_targets)

    def put_gradient(
        self,
        out: Tensor,
        block: Block,
        tokens: slice,
        statistics: Statistics,
        grads: Statistics,
        *,
        logits: Tensor | None,
        sum_tokens: bool,
    ) -> Tensor | None:
        """See `TileOps.put_gradient`."""
        if logits is not None:
            return super().put_gradient(
                out, block, tokens, statistics, grads, logits=logits, sum_tokens=sum_tokens
            )
        from vocab_parallel.kernels.product_gradient import product_gradient

        shard = block.shard
        return product_gradient(
            shard.hidden[tokens], block.classifier, block.bias, shard.targets[tokens], block.start,
            statistics.of(tokens).values, grads.of(tokens).values, statistics.names, out,
            shard.transform, sum_tokens=sum_tokens,
        )  # fmt: skip


def corner(buffer: Tensor, tokens: slice, rows: slice) -> Tensor:
    """Return the part of a tile's buffer that some tokens and rows need."""
    return buffer[: tokens.stop - tokens.start, : rows.stop - rows.start]


def widened(operand: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tile's operand in the dtype in which its device can multiply it into ``dtype``.

    cuBLAS multiplies float16 and bfloat16 into float32 directly. A CPU has no such product, so
    that the operands, which are a tile's and therefore small, are widened first; that is also more
    accurate than a low-precision product, and on most CPUs faster.
    """
    return operand if operand.is_cuda else operand.to(dtype)


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
    elif not a.is_cuda:  # a and b are wider
        found = a @ b
        destination.copy_(found.add_(destination) if add else found)
    elif add:
        torch.addmm(destination, a, b, out_dtype=destination.dtype, out=destination)
    else:
        torch.mm(a, b, out_dtype=destination.dtype, out=destination)


def well_scaled(
    grads: Statistics, product_dtype: torch.dtype, *, peak: float
) -> tuple[Statistics, Tensor | None]:
    """Bring gradients to at most ``peak`` where they enter a product of float16 on a GPU.

    The small numbers of float16 end at 6e-8: a probability over a token count would underflow.
    The returned unit multiplies the product's result; None where nothing was scaled.
    """
    values = grads.values
    if product_dtype != torch.float16 or not values.is_cuda:
        return grads, None
    unit = values.abs().amax().clamp(min=torch.finfo(values.dtype).tiny) / peak
    return Statistics(values / unit, grads.names), unit


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


def _gradient_in_place(
    logits: Tensor,  # (n, r), raw; overwritten
    block: Block,
    targets: Tensor,  # (n,), counted from the tile's first row
    statistics: Statistics,  # (k, n)
    grads: Statistics,  # (k, n)
) -> None:
    """Put the gradient of the product in its place; `interface.py` has the formula."""
    finish_logits_(logits, block)
    cap, temperature = block.shard.transform
    lse, target, factor = (x.unsqueeze(1) for x in (statistics.lse, statistics.target, grads.lse))
    capped = None if cap is None else logits * (temperature / cap)
    at_target = factor * torch.expm1(target - lse) + (factor + grads.target.unsqueeze(1))
    logits.sub_(lse)
    if "expected" in statistics:
        mean, mean_grad = statistics.expected.unsqueeze(1), grads.expected.unsqueeze(1)
        # No probability, no gradient: not 0 times -inf.
        finite = logits.masked_fill(logits == -torch.inf, 0.0)
        factor = finite.sub_(mean).mul_(mean_grad).add_(factor)
        log_p = target - lse
        finite_log_p = log_p.masked_fill(target == -torch.inf, 0.0)
        at_target += mean_grad * log_p.exp() * (finite_log_p - mean)
    gradient = logits.exp_().mul_(factor)
    inside, index = owned_targets(targets, gradient.shape[1])
    index = index.unsqueeze(1)
    gradient.scatter_(
        1, index, torch.where(inside.unsqueeze(1), at_target, gradient.gather(1, index))
    )
    if "sum" in statistics:
        gradient.add_(grads.sum.unsqueeze(1))
    if capped is not None:  # d tanh = 1 - tanh^2
        gradient.addcmul_(gradient, capped.square_(), value=-1.0)
    if temperature != 1.0:
        gradient.div_(temperature)


def _evenly(length: int, most: int, grain: int) -> list[slice]:
    """Cut tokens into as few parts as have at most so many, of about one length by the grain."""
    count = -(-length // max(most, grain))
    size = -(-length // (grain * count)) * grain
    return list(blocks(length, size))
