"""Who is timed: the products alone, ours in each way, and others' losses.

Each contestant computes the mean loss of the same hidden states, rows and targets, and returns
the gradients of hidden states and rows; "into main_grad" adds the latter to a float32 accumulator
that is there already. The rows are a shard: of a group of one rank, or of a real group, whose
ranks then call each contestant together and whose collectives are the contestant's own.
A peer that is not installed is left out, with the reason.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from vocab_parallel import VocabParallelOptions, linear_cross_entropy
from vocab_parallel.collectives import VocabGroup
from vocab_parallel.layout import HiddenLayout

Gradients = tuple[Tensor, Tensor]
Contestant = Callable[[], Gradients]
FLOOR_CHUNKS = (2048, 4096, 8192)
PEERS_OF_A_GROUP = (
    "cut-cross-entropy cce",
    "cut-cross-entropy cce_exact",
    "liger, tensor-parallel",
    "fla, process group",
)
# Those, and two that materialise a shard's logits.
PEERS_OVER_RANKS = (
    *PEERS_OF_A_GROUP,
    "cut-cross-entropy torch_compile",
    "torch, loss_parallel",
)
PEERS_OF_ONE_GPU = ("cut-cross-entropy, one GPU", "liger, one GPU", "quack, one GPU")


@dataclass(frozen=True)
class Operands:
    """One rank's part of a call, with V ranks in its group.

        layout          hidden states     rows                  targets
        "replicated"    [T, D]            [stop - start, D]     [T]
        "sharded"       [T / V, D]        [stop - start, D]     [T / V]
        "sequence"      [T / V, D]        [stop - start, D]     [T]

    Attributes:
        options: which rows these are, of which group; None: all of them, on a rank alone.
    """

    hidden: Tensor
    rows: Tensor
    targets: Tensor
    options: VocabParallelOptions | None = None
    layout: HiddenLayout = "replicated"

    @property
    def shard(self) -> VocabParallelOptions:
        """The options as a peer wants them: a rank alone is the default group."""
        return self.options or VocabParallelOptions(0, self.rows.shape[0], dist.group.WORLD)

    @property
    def group(self) -> VocabGroup:
        return VocabGroup() if self.options is None else VocabGroup.of(self.options.group)

    @property
    def own_tokens(self) -> slice:
        """This rank's hidden states among the T."""
        count = self.hidden.shape[0]
        first = 0 if self.layout == "replicated" else self.group.rank * count
        return slice(first, first + count)

    def laid_out(self, layout: HiddenLayout) -> "Operands":
        """Return replicated operands in another layout, of the same T tokens together.

        Raises:
            ValueError: the group's ranks do not divide the tokens.
        """
        if layout == "replicated":
            return self
        count, remainder = divmod(self.hidden.shape[0], self.group.degree)
        if remainder:
            raise ValueError(
                f'the layout "{layout}" needs equally many tokens on each rank: '
                f"{self.group.degree} do not divide {self.hidden.shape[0]}"
            )
        own = slice(self.group.rank * count, (self.group.rank + 1) * count)
        hidden = self.hidden.detach()[own].clone().requires_grad_()
        targets = self.targets[own] if layout == "sharded" else self.targets
        return replace(self, hidden=hidden, targets=targets, layout=layout)

    def gradients(self, loss: Any) -> Gradients:
        found = torch.autograd.grad(loss, (self.hidden, self.rows))
        return found[0], found[1]


def draw(tokens: int, hidden: int, rows: int, dtype: torch.dtype, device: torch.device) -> Operands:
    """Draw a set of operands whose logits have a deviation of 1."""
    torch.manual_seed(0)
    e = torch.randn(tokens, hidden, device=device).to(dtype)
    c = (torch.randn(rows, hidden, device=device) / hidden**0.5).to(dtype)
    targets = torch.randint(rows, (tokens,), device=device)
    return Operands(e.requires_grad_(), c.requires_grad_(), targets)


def draw_over_group(
    tokens: int,
    hidden: int,
    options: VocabParallelOptions,
    dtype: torch.dtype,
    device: torch.device,
) -> Operands:
    """Draw replicated operands of a group: its ranks have the same tokens and their own rows.

    What is the same is drawn on the host, whatever cards the ranks have.
    """
    assert options.vocab_size is not None
    torch.manual_seed(0)
    e = torch.randn(tokens, hidden).to(device, dtype)
    targets = torch.randint(options.vocab_size, (tokens,)).to(device)
    torch.manual_seed(1 + options.start)
    c = torch.randn(options.stop - options.start, hidden, device=device) / hidden**0.5
    return Operands(e.requires_grad_(), c.to(dtype).requires_grad_(), targets, options)


def other_targets(operands: Operands) -> dict[str, Operands]:
    """Return operands whose targets repeat: by Zipf's law, as text's do, and all of one row."""
    num_rows = operands.rows.shape[0]
    # The inverse of log(1 + x) / log(1 + rows), the distribution of ranks under Zipf's law.
    share = torch.rand(operands.targets.shape, device=operands.targets.device, dtype=torch.float64)
    zipf = ((num_rows + 1.0) ** share - 1.0).long().clamp(max=num_rows - 1)
    one = torch.full_like(operands.targets, num_rows // 3)
    return {
        "Zipf's targets": replace(operands, targets=zipf),
        "one target": replace(operands, targets=one),
    }


def confident(operands: Operands) -> Operands:
    """Return operands whose every target has most of the probability: a trained model's.

    They are replicated; where they are a group's, each of its ranks calls.
    """
    rows = operands.rows.detach()
    local = operands.targets - operands.shard.start
    owned = (local >= 0) & (local < rows.shape[0])
    toward = rows[torch.where(owned, local, 0)].float().masked_fill_(~owned.unsqueeze(1), 0.0)
    toward = operands.group.sum(toward)
    toward *= 16.0 / toward.square().sum(1, keepdim=True)
    hidden = (0.3 * operands.hidden.detach().float() + toward).to(rows.dtype)
    return replace(operands, hidden=hidden.requires_grad_())


def floors(operands: Operands) -> dict[str, Contestant]:
    """Return the three products alone, in chunks of tokens; nothing between them, no allocation.

    Logits lie in lines of 128 bytes, and the rows beyond the last multiple of 128 go by
    themselves where cuBLAS would be slow: what a loss could do, too.
    """
    num_tokens = operands.hidden.shape[0]
    sizes = [size for size in FLOOR_CHUNKS if size <= num_tokens] or [num_tokens]
    return {f"products, {size} tokens": _products(operands, size) for size in sizes}


def _products(operands: Operands, chunk: int) -> Contestant:
    e, c = operands.hidden.detach(), operands.rows.detach()
    num_rows = c.shape[0]
    main = num_rows // 128 * 128 if e.is_cuda and num_rows % 8 else num_rows
    blocks = [slice(0, main)] + ([slice(main, num_rows)] if main < num_rows else [])
    pitch = -(-num_rows // 64) * 64
    logits = e.new_empty((min(chunk, e.shape[0]), pitch))
    hidden_grad, rows_grad = torch.empty_like(e), torch.empty_like(c)

    def run() -> Gradients:
        for start in range(0, e.shape[0], chunk):
            own = e[start : start + chunk]
            for rows in blocks:
                tile = logits[: own.shape[0], rows]
                torch.mm(own, c[rows].T, out=tile)
                into = hidden_grad[start : start + chunk]
                if rows.start:
                    into.addmm_(tile, c[rows])
                else:
                    torch.mm(tile, c[rows], out=into)
                if start:
                    rows_grad[rows].addmm_(tile.T, own)
                else:
                    torch.mm(tile.T, own, out=rows_grad[rows])
        return hidden_grad, rows_grad

    return run


def between_collectives(operands: Operands, gathers: bool, products: Contestant) -> Contestant:
    """Return the products of replicated operands with the collectives of a layout, one call each.

    A layout that gathers gathers [T / V, D] before them and reduce-scatters [T, D] in float32
    behind; the other all-reduces [T, D] in float32 behind. Nothing is cast.
    """
    group = operands.group
    own = operands.laid_out("sharded" if gathers else "replicated").hidden.detach()
    partial = torch.zeros_like(operands.hidden, dtype=torch.float32, requires_grad=False)

    def run() -> Gradients:
        if gathers:
            group.gather_tokens(own)
        found = products()
        if gathers:
            group.scatter_sum(partial)
        else:
            group.sum(partial)
        return found

    return run


def ours(
    operands: Operands, *, loss: Callable[..., Any] = linear_cross_entropy, **options: Any
) -> Contestant:
    """Return our loss, or an older one, with some options."""
    return lambda: operands.gradients(
        loss(
            operands.hidden,
            operands.rows,
            operands.targets,
            vocab_parallel_options=operands.options,
            hidden_layout=operands.layout,
            **options,
        )
    )


def ours_into_main_grad(operands: Operands, **options: Any) -> Contestant:
    """Return our loss with the rows' gradient added to a float32 accumulator."""
    rows = operands.rows.detach().clone().requires_grad_()
    rows.main_grad = torch.zeros_like(rows, dtype=torch.float32)  # type: ignore[attr-defined]

    def run() -> Gradients:
        loss = linear_cross_entropy(
            operands.hidden, rows, operands.targets, accumulate_into="main_grad", **options
        )
        operands.hidden.grad = None
        loss.backward()  # type: ignore[union-attr]
        assert operands.hidden.grad is not None
        return operands.hidden.grad, rows.main_grad  # type: ignore[attr-defined]

    return run


def materialised(operands: Operands, compiled: bool) -> Contestant:
    """Return torch's own loss over whole logits in float32."""

    def loss(e: Tensor, c: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(e, c).float(), targets)

    chosen = torch.compile(loss) if compiled else loss
    return lambda: operands.gradients(chosen(operands.hidden, operands.rows, operands.targets))


def loss_parallel_logits(operands: Operands) -> Contestant:
    """Return torch's loss over DTensor logits whose rows are sharded, as torchtitan's TP has it.

    DTensor gathers hidden states that are sharded over the sequence, and reduces their gradient.
    A mesh of one rank, whose rows are a shard, shows what one rank computes.
    """
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
    from torch.distributed.tensor.parallel import loss_parallel

    _need_equal_shards(operands)
    group = operands.shard.group or dist.group.WORLD
    mesh = DeviceMesh.from_group(group, operands.hidden.device.type)  # type: ignore[arg-type]
    replicated: list[Placement] = [Replicate()]
    placed: list[Placement] = [Shard(0)] if operands.layout == "sequence" else replicated
    targets = DTensor.from_local(operands.targets, mesh, replicated)

    def run() -> Gradients:
        hidden = DTensor.from_local(operands.hidden, mesh, placed)
        rows = DTensor.from_local(operands.rows, mesh, [Shard(0)])
        with loss_parallel():
            logits = F.linear(hidden.redistribute(placements=replicated), rows).float()
            return operands.gradients(F.cross_entropy(logits, targets))

    return run


def peers(operands: Operands) -> tuple[dict[str, Contestant], dict[str, str]]:
    """Return the peers that are installed and, for the others, why they are not here."""
    found: dict[str, Contestant] = {}
    missing: dict[str, str] = {}
    for name in (*PEERS_OF_A_GROUP, *PEERS_OF_ONE_GPU):
        try:
            contestant = peer(operands, name)
            contestant()  # some fail only when they run
            found[name] = contestant
        except Exception as error:
            missing[name] = in_words(error)
    return found, missing


def in_words(error: Exception) -> str:
    """Return why a contestant is left out."""
    return f"{type(error).__name__}: {str(error).strip()[:200]}"


def peer(operands: Operands, name: str) -> Contestant:
    """Return one peer's loss; ImportError where it is not installed."""
    makers: dict[str, Callable[[], Contestant]] = {
        "cut-cross-entropy cce": lambda: _cut_cross_entropy(operands, "cce"),
        "cut-cross-entropy cce_exact": lambda: _cut_cross_entropy(operands, "cce_exact"),
        "cut-cross-entropy torch_compile": lambda: _cut_cross_entropy(operands, "torch_compile"),
        "liger, tensor-parallel": lambda: _liger_parallel(operands),
        "fla, process group": lambda: _fla(operands),
        "torch, loss_parallel": lambda: loss_parallel_logits(operands),
        "cut-cross-entropy, one GPU": lambda: _cut_cross_entropy(operands, "cce", alone=True),
        "liger, one GPU": lambda: _liger(operands),
        "quack, one GPU": lambda: _quack(operands),
    }
    return makers[name]()


def _need_equal_shards(operands: Operands) -> None:
    whole, degree = operands.shard.vocab_size, operands.group.degree
    if whole is not None and whole % degree:
        raise ValueError(f"needs equal shards, and {degree} ranks do not divide {whole} rows")


def _cut_cross_entropy(operands: Operands, impl: str, *, alone: bool = False) -> Contestant:
    import cut_cross_entropy as package

    options = {}
    if not alone:
        shard = operands.shard
        own = package.VocabParallelOptions(shard.start, shard.stop, shard.group)
        options = {"vocab_parallel_options": own}
    return lambda: operands.gradients(
        package.linear_cross_entropy(
            operands.hidden, operands.rows, operands.targets, impl=impl, **options
        )
    )


def _liger_parallel(operands: Operands) -> Contestant:
    from liger_kernel.transformers import functional

    _need_equal_shards(operands)
    count, group = operands.targets.numel(), operands.shard.group
    return lambda: operands.gradients(
        functional.liger_fused_linear_scaled_cross_entropy_tp(
            operands.hidden, operands.rows, operands.targets, group
        ).sum()
        / count
    )


def _liger(operands: Operands) -> Contestant:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss()
    return lambda: operands.gradients(loss(operands.rows, operands.hidden, operands.targets))


def _fla(operands: Operands) -> Contestant:
    from fla.modules.fused_linear_cross_entropy import FusedLinearCrossEntropyLoss

    _need_equal_shards(operands)
    loss = FusedLinearCrossEntropyLoss(process_group=operands.shard.group)
    return lambda: operands.gradients(
        loss(operands.hidden[None], operands.targets[None], operands.rows)
    )


def _quack(operands: Operands) -> Contestant:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    tokens, width = operands.hidden.shape
    # All tokens at once are its fastest; as many as the hidden size it takes for another tensor.
    chunk = tokens if tokens != width else tokens // 2
    return lambda: operands.gradients(
        chunked_linear_cross_entropy(
            operands.hidden, operands.rows, operands.targets, reduction="mean", chunk_size=chunk
        )
    )
