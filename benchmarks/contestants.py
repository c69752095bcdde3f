"""Who is timed on one shard: the products alone, ours in each way, and others' losses.

Each contestant computes the mean loss of the same hidden states, rows and targets, and returns
the gradients of hidden states and rows; "into main_grad" adds the latter to a float32 accumulator
that is there already. A peer that is not installed is left out, with the reason.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from vocab_parallel import linear_cross_entropy

Gradients = tuple[Tensor, Tensor]
Contestant = Callable[[], Gradients]
FLOOR_CHUNKS = (2048, 4096, 8192)
PEERS_OF_A_GROUP = (
    "cut-cross-entropy cce",
    "cut-cross-entropy cce_exact",
    "liger, tensor-parallel",
    "fla, process group",
)
PEERS_OF_ONE_GPU = ("cut-cross-entropy, one GPU", "liger, one GPU", "quack, one GPU")


@dataclass(frozen=True)
class Operands:
    """One shard: hidden states [T, D], rows [R, D] and targets [T]."""

    hidden: Tensor
    rows: Tensor
    targets: Tensor

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


def confident(operands: Operands) -> Operands:
    """Return operands whose every target has most of the probability: a trained model's."""
    rows = operands.rows.detach()
    toward = rows[operands.targets].float()
    toward *= 16.0 / toward.square().sum(1, keepdim=True)
    hidden = (0.3 * operands.hidden.detach().float() + toward).to(rows.dtype)
    return Operands(hidden.requires_grad_(), operands.rows, operands.targets)


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


def ours(operands: Operands, **options: Any) -> Contestant:
    """Return our loss with some options."""
    return lambda: operands.gradients(
        linear_cross_entropy(operands.hidden, operands.rows, operands.targets, **options)
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

    The mesh has one rank, whose rows are a shard: what the other ranks' three all-reduces of [N]
    would add is not in it.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard
    from torch.distributed.tensor.parallel import loss_parallel

    mesh = init_device_mesh(operands.hidden.device.type, (1,))
    targets = DTensor.from_local(operands.targets, mesh, [Replicate()])

    def run() -> Gradients:
        with loss_parallel():
            logits = F.linear(operands.hidden, operands.rows).float()
            sharded = DTensor.from_local(logits, mesh, [Shard(-1)])
            loss = F.cross_entropy(sharded, targets)
            return operands.gradients(loss)

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
            missing[name] = f"{type(error).__name__}: {str(error).strip()[:200]}"
    return found, missing


def peer(operands: Operands, name: str) -> Contestant:
    """Return one peer's loss; ImportError where it is not installed."""
    group = dist.group.WORLD
    makers: dict[str, Callable[[], Contestant]] = {
        "cut-cross-entropy cce": lambda: _cut_cross_entropy(operands, "cce", group),
        "cut-cross-entropy cce_exact": lambda: _cut_cross_entropy(operands, "cce_exact", group),
        "liger, tensor-parallel": lambda: _liger_parallel(operands, group),
        "fla, process group": lambda: _fla(operands, group),
        "cut-cross-entropy, one GPU": lambda: _cut_cross_entropy(operands, "cce", None),
        "liger, one GPU": lambda: _liger(operands),
        "quack, one GPU": lambda: _quack(operands),
    }
    return makers[name]()


def _cut_cross_entropy(operands: Operands, impl: str, group: Any) -> Contestant:
    import cut_cross_entropy as package

    options = {}
    if group is not None:
        shard = package.VocabParallelOptions(0, operands.rows.shape[0], group)
        options = {"vocab_parallel_options": shard}
    return lambda: operands.gradients(
        package.linear_cross_entropy(
            operands.hidden, operands.rows, operands.targets, impl=impl, **options
        )
    )


def _liger_parallel(operands: Operands, group: Any) -> Contestant:
    from liger_kernel.transformers import functional

    count = operands.targets.numel()
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


def _fla(operands: Operands, group: Any) -> Contestant:
    from fla.modules.fused_linear_cross_entropy import FusedLinearCrossEntropyLoss

    loss = FusedLinearCrossEntropyLoss(process_group=group)
    return lambda: operands.gradients(
        loss(operands.hidden[None], operands.targets[None], operands.rows)
    )


def _quack(operands: Operands) -> Contestant:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return lambda: operands.gradients(
        chunked_linear_cross_entropy(
            operands.hidden, operands.rows, operands.targets, reduction="mean"
        )
    )
