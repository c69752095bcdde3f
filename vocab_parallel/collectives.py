"""Every torch.distributed call that the loss makes; no other file of the library makes one.

N is the number of tokens that the loss covers, T those of this rank (N = V T in the gathering
layouts, N = T otherwise; of H predictions of each position all are counted), k the number of
statistics (2; one more with label smoothing, one with an entropy, two with metrics), V the vocab
degree. A call moves nothing when the degree is 1. Bytes are those that one rank contributes:

    forward   gather_tokens     [T] int32 targets     4 T          layout "sharded"
              gather_tokens     [T] fp32 weights      4 T          layout "sharded", token_weight
              gather_tokens     [T, D] hidden states  T D itemsize layouts "sharded", "sequence"
              gather_shards     [k, N] fp32           4 k N        always
    backward  scatter_sum       [N, D] fp32           4 N D        layout "replicated", and then
              gather_tokens     [N / V, D]            N D itemsize / V
              sum               [N, D] fp32           4 N D        in their place where nothing is
                                                                   rounded or V does not divide N
              scatter_sum       [N, D] fp32           4 N D        layouts "sharded", "sequence"
              sum_at            [T, D] fp32           4 T D        in its place, in a long call
              gather_tokens     [T] fp32              4 T          per-token results, gathering
    logprobs  sum               one fp32              4            `LogprobsPipelineLoss`, gathering
    predict   gather_shards     [N, m] fp32, int64    12 m N       m candidates of each token
              gather_shards     [N] fp32              4 N          and its lse
    distill   gather_tokens     [T, D'] or [T, k]     of the teacher's     gathering layouts
              gather_shards     [k, N] fp32           4 k N        its statistics in forward's place
              gather_shards     [2, N] fp32           8 N          divergence "js"
    embedding gather_tokens     [T] int64 ids         8 T          layout "sharded"
              scatter_sum       [V T, D]              V T D itemsize  (sum_over_group: "replicated")
    backward  gather_tokens     [T, D]                T D itemsize    layout "sharded"
    tied      exchange_with_peer [rows, D]            rows D itemsize, between the pipeline's ends
    export    gather_rows       [rows, D]             rows D itemsize, V calls
    columns   sum               the body's gradients  theirs, up to 64 MiB a call: once a step
    all stages start_broadcast  [T, D] hidden states  T D itemsize, from the last stage, each
              gather_shards     [k, N] fp32           4 k N         microbatch; N = V T where the V
              sum_at            [T, D] fp32           4 T D         columns have their own tokens,
              sum_at            [T, D] embeddings     T D itemsize  then V calls of each with T;
              start_broadcast   [T, D] their gradient T D itemsize  embeddings to the first stage

(float64 inputs keep float64 throughout.)

The sum runs beside the classifier's product. In a long call (`plan.py`) it goes a
span of 8192 tokens at a time: in the gathering layouts by sum_at, a call for each rank whose tokens
a span has.
"""

import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from vocab_parallel.options import group_rank_and_size


class Pending:
    """A collective under way; `wait` returns its result.

    On a GPU it runs on the group's own stream, behind the work that was queued before it, and
    beside what is queued after it; `wait` lets the current stream wait, not the host. It holds its
    tensors until then, so that none is freed or written while it runs.
    """

    def __init__(
        self, result: Tensor, work: Any, what: str, group: ProcessGroup | None, held: Any = None
    ) -> None:
        self._result, self._work, self._what, self._group = result, work, what, group
        self._held = held  # what the collective reads

    def wait(self) -> Tensor:
        """Return the result, for work that is queued from now on."""
        if self._work is not None:
            with _named(self._what, self._group):
                self._work.wait()
        self._held = None
        return self._result


class Several(Pending):
    """Some collectives under way, each of a part of one result."""

    def __init__(self, result: Tensor, parts: Sequence[Pending]) -> None:
        super().__init__(result, None, "", None)
        self._parts = parts

    def wait(self) -> Tensor:
        """Return the whole result, for work that is queued from now on."""
        for part in self._parts:
            part.wait()
        self._parts = ()
        return super().wait()


@dataclass(frozen=True)
class VocabGroup:
    """The ranks that share a vocabulary, as one of them sees them; every method is a collective.

    All ranks of the group must call the same methods in the same order, with equal shapes. Nothing
    is communicated where there is one rank alone.

    Attributes:
        group: the process group; None is the default group.
        rank: this process's, in the group.
        degree: V, how many there are.
    """

    group: ProcessGroup | None = None
    rank: int = 0
    degree: int = 1

    @classmethod
    def of(cls, group: ProcessGroup | None) -> Self:
        """Find this rank's place; one rank alone where torch.distributed is not initialized.

        Raises:
            ValueError: this rank is not a member of the group.
        """
        return cls(group, *group_rank_and_size(group))

    def _start(
        self, what: str, collective: Any, result: Tensor, *given: Any, held: Any = None
    ) -> Pending:
        """Start a collective of the given arguments, and return what waits for its result."""
        with _named(what, self.group):
            work = collective(*given, group=self.group, async_op=True)
        return Pending(result, work, what, self.group, held)

    def gather_tokens(self, tokens: Tensor) -> Tensor:  # (T, ...) -> (V T, ...), rank-major
        """Gather equally many tokens from every rank."""
        if self.degree == 1:
            return tokens
        gathered = tokens.new_empty((self.degree * tokens.shape[0], *tokens.shape[1:]))
        with _named("the all-gather of tokens", self.group):
            _all_gather(gathered, tokens.contiguous(), group=self.group)
        return gathered

    def start_gather_shards(self, local: Tensor) -> Pending:  # (...) -> (V, ...)
        """Gather what every rank found over its own rows.

        With the statistics [k, N] this is the loss's one collective in forward.
        """
        what = "the all-gather of the shards' statistics"
        if self.degree == 1:
            return Pending(local.unsqueeze(0), None, what, self.group)
        local = local.contiguous()
        gathered = local.new_empty((self.degree * local.shape[0], *local.shape[1:]))
        whole = gathered.view(self.degree, *local.shape)
        return self._start(what, _all_gather, whole, gathered, local, held=local)

    def gather_shards(self, local: Tensor) -> Tensor:
        """`start_gather_shards`, waited for."""
        return self.start_gather_shards(local).wait()

    def gather_rows(self, own: Tensor, row_counts: Sequence[int]) -> Tensor:
        """Gather the rows [n, ...] of every rank, so many of each, into the whole.

        A call for each rank with rows, into the place of its own: nothing is padded.
        """
        whole = own.new_empty((sum(row_counts), *own.shape[1:]))
        parts = whole.split(list(row_counts))
        parts[self.rank].copy_(own)
        if self.degree > 1:
            ranks = dist.get_process_group_ranks(self.group)
            with _named("the gathering of rows", self.group):
                for rank, part in zip(ranks, parts, strict=True):
                    if part.numel() > 0:
                        dist.broadcast(part, rank, group=self.group)
        return whole

    def start_sum(self, partial: Tensor) -> Pending:
        """All-reduce a partial gradient, [N, D] for the hidden states.

        In place where it is contiguous; other strides would add up different elements, since a
        collective sees memory and not indices.
        """
        what = "the all-reduce of a gradient"
        if self.degree == 1:
            return Pending(partial, None, what, self.group)
        partial = partial.contiguous()
        return self._start(what, dist.all_reduce, partial, partial)

    def sum(self, partial: Tensor) -> Tensor:
        """`start_sum`, waited for."""
        return self.start_sum(partial).wait()

    def start_scatter_sum(self, partial: Tensor) -> Pending:  # (V T, D) -> (T, D)
        """Sum partial gradients and leave each rank its own tokens."""
        what = "the reduce-scatter of a gradient"
        if self.degree == 1:
            return Pending(partial, None, what, self.group)
        partial = partial.contiguous()
        own = partial.new_empty((partial.shape[0] // self.degree, *partial.shape[1:]))
        return self._start(what, _reduce_scatter, own, own, partial, held=partial)

    def scatter_sum(self, partial: Tensor) -> Tensor:
        """`start_scatter_sum`, waited for."""
        return self.start_scatter_sum(partial).wait()

    def start_sum_at(self, partial: Tensor, owner: int) -> Pending:  # (n, D)
        """Sum partial gradients of one rank's tokens on that rank, in place.

        The result is that sum on the owner, and nothing in particular elsewhere.
        """
        what = "the reduction of a gradient"
        if self.degree == 1:
            return Pending(partial, None, what, self.group)
        partial = partial.contiguous()
        where = dist.get_process_group_ranks(self.group)[owner]
        return self._start(what, dist.reduce, partial, partial, where)

    def start_broadcast(self, tensor: Tensor, owner: int) -> Pending:
        """Give every rank the owner's tensor, in place."""
        what = "the broadcast of hidden states"
        if self.degree == 1:
            return Pending(tensor, None, what, self.group)
        where = dist.get_process_group_ranks(self.group)[owner]
        return self._start(what, dist.broadcast, tensor, tensor, where)

    def exchange_integers(self, values: list[int]) -> Tensor:
        """Gather a few integers of every rank, as int64 [V, n] on the CPU.

        Waits for the result, so it is for validation, never for the training path of a GPU.
        """
        own = torch.tensor(values, dtype=torch.int64, device=group_device(self.group))
        return self.gather_tokens(own).view(self.degree, len(values)).cpu()

    def exchange_objects(self, value: Any) -> list[Any]:
        """Gather a small picklable object of every rank, to word an error.

        By `exchange_integers`, since torch's all_gather_object fails inside of torch.func.
        """
        if self.degree == 1:
            return [value]
        own = list(pickle.dumps(value))
        lengths = self.exchange_integers([len(own)])[:, 0].tolist()
        every = self.exchange_integers(own + [0] * (max(lengths) - len(own))).tolist()
        return [
            pickle.loads(bytes(each[:length])) for each, length in zip(every, lengths, strict=True)
        ]


def exchange_with_peer(own: Tensor, peer: int, group: ProcessGroup) -> Tensor:
    """Send a tensor to another rank of the group and return its own of that shape; both call.

    Nothing is sent where the tensors are empty.
    """
    if own.numel() == 0:
        return own
    own = own.contiguous()
    other = torch.empty_like(own)
    there = dist.get_global_rank(group, peer)
    with _named("the exchange of a tied weight's gradients", group):
        for work in dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, own, there, group),
                dist.P2POp(dist.irecv, other, there, group),
            ]
        ):
            work.wait()
    return other


# torch 2.13 renamed the two and deprecates the old names, which older versions alone have.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def group_device(group: ProcessGroup | None) -> torch.device:
    """Return a device that the group's backend can communicate from, the CPU if it can."""
    if "cpu" in dist.get_backend_config(group):
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


@contextmanager
def _named(what: str, group: ProcessGroup | None) -> Iterator[None]:
    """Say of a collective that failed which ranks it was among, and what is likely wrong."""
    try:
        yield
    except RuntimeError as error:
        members = dist.get_process_group_ranks(group)
        raise RuntimeError(
            f"{what} over the group of ranks {members} failed on rank {dist.get_rank()}: most "
            f"likely one of them died or raised, and its own traceback says why; or it did not "
            f"come to this call, because the ranks were given unlike arguments or unlike numbers "
            f"of microbatches"
        ) from error
