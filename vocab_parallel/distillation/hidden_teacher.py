"""A teacher that is given as hidden states and rows: its logits are made tile by tile.

With u the teacher's logits, z the student's, q = softmax(u) and p = softmax(z), what one pass over
the tiles accumulates with running maxima is

    forward_kl   E_q[u - z] - lse(u) + lse(z)      dz = g (p - q)
    reverse_kl   E_p[z - u] - lse(z) + lse(u)      dz = g p (z - u - E_p[z - u])
    js           lse(u), lse(z)

and the third needs another pass, once both lse are known, for the distances to the mixture m:

    js           beta E_q[log q - log m] + (1 - beta) E_p[log p - log m]
                 dz = g (1 - beta) p (log p - log m - E_p[log p - log m])

The gradient of js: that of p goes through log p and through m, and all of the latter cancels but
for a constant, which the softmax takes away.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vocab_parallel.distillation.columns import Column, Columns, TokenStatistics
from vocab_parallel.distillation.divergences import Divergence, log_mixture_
from vocab_parallel.distillation.labels import softmax_parts_
from vocab_parallel.local.backward_plan import padded
from vocab_parallel.local.interface import Shard
from vocab_parallel.local.tile_ops import finish_logits_

_TO_MIXTURE = (Column("teacher_to_mixture", "sum"), Column("student_to_mixture", "sum"))


def logits_of(shard: Shard, tokens: slice, rows: slice, spare: int = 0) -> Tensor:
    """Make a tile of logits [n, r + spare] in the accumulation dtype; spare columns are not set."""
    block = shard.ops.block(shard, rows)
    num_rows = rows.stop - rows.start
    wide = num_rows + spare
    # cuBLAS is slow where lines of the result are not aligned.
    pitch = padded(wide) if shard.hidden.is_cuda else wide
    shape = (tokens.stop - tokens.start, pitch)
    out = shard.hidden.new_empty(shape, dtype=shard.dtype)[:, :wide]
    finish_logits_(shard.ops.put_raw_logits(out[:, :num_rows], block, tokens), block)
    return out


@dataclass(frozen=True)
class HiddenTeacher:
    """Compares the student's logits with those of a teacher's shard.

    Attributes:
        divergence: which, and its beta.
        shard: the teacher's rows of this rank, with the loss's tokens; None where there are none.
    """

    divergence: Divergence
    shard: Shard | None

    spare: ClassVar = 0  # columns beside a tile's logits

    @property
    def columns(self) -> Columns:
        """What one pass accumulates."""
        lse = (Column("lse", "logsumexp"), Column("teacher_lse", "logsumexp"))
        if self.divergence.name == "js":
            return lse
        under = "teacher_lse" if self.divergence.name == "forward_kl" else "lse"
        return (*lse, Column("mean", "mean", under))

    @property
    def later_columns(self) -> Columns:
        """What a second pass adds up, over the tiles and over the group."""
        return _TO_MIXTURE if self.divergence.name == "js" else ()

    @property
    def tiles(self) -> int:
        """How many tensors of a tile's shape are held at the worst moment.

        That is in backward: the logits of both, their difference, and what a mixture and the
        comparison with 0 take.
        """
        return {"forward_kl": 4, "reverse_kl": 4, "js": 6}[self.divergence.name]

    def statistics(self, logits: Tensor, tokens: slice, rows: slice) -> list[Tensor]:
        """Return the statistics of a tile, each [n]; overwrites its logits."""
        assert self.shard is not None
        teacher = logits_of(self.shard, tokens, rows)
        name = self.divergence.name
        difference = {
            "forward_kl": lambda: teacher - logits,
            "reverse_kl": lambda: logits - teacher,
            "js": lambda: None,
        }[name]()
        lse, student_weights, student_sum = softmax_parts_(logits)
        teacher_lse, teacher_weights, teacher_sum = softmax_parts_(teacher)
        if difference is None:
            return [lse, teacher_lse]
        weights, total = student_weights, student_sum
        if name == "forward_kl":
            weights, total = teacher_weights, teacher_sum
        # What has no probability adds nothing: not 0 times inf.
        weighted = difference.masked_fill_(weights == 0.0, 0.0).mul_(weights)
        mean = weighted.sum(1).div_(total.masked_fill(total == 0.0, 1.0))
        return [lse, teacher_lse, mean]

    def later_statistics(
        self, logits: Tensor, statistics: TokenStatistics, tokens: slice, rows: slice
    ) -> list[Tensor]:
        """Return what a tile adds to the distances to the mixture, each [n]."""
        assert self.shard is not None
        beta = self.divergence.beta
        teacher = logits_of(self.shard, tokens, rows)
        ratio = _log_ratio(teacher, logits, statistics)
        q = teacher.sub_(_line(statistics["teacher_lse"])).exp_()
        p = logits.sub_(_line(statistics["lse"])).exp_()
        to_teacher = log_mixture_(-ratio, 1.0 - beta).masked_fill_(q == 0.0, 0.0).mul_(q).sum(1)
        to_student = log_mixture_(ratio, beta).masked_fill_(p == 0.0, 0.0).mul_(p).sum(1)
        return [to_teacher.neg_(), to_student.neg_()]

    def gradient(
        self, logits: Tensor, statistics: TokenStatistics, grads: Tensor, tokens: slice, rows: slice
    ) -> Tensor:
        """Return the gradient [n, r] of a tile's logits, in their place or in another.

        Args:
            logits: [n, r], the student's.
            statistics: of the tile's tokens, of the whole vocabulary.
            grads: [1, n], what each token's divergence receives.
            tokens, rows: the tile.
        """
        assert self.shard is not None
        teacher = logits_of(self.shard, tokens, rows)
        lse, teacher_lse = _line(statistics["lse"]), _line(statistics["teacher_lse"])
        grad = _line(grads[0])
        name = self.divergence.name
        if name == "forward_kl":
            q = teacher.sub_(teacher_lse).exp_()
            return logits.sub_(lse).exp_().sub_(q).mul_(grad)
        if name == "reverse_kl":
            distance = torch.sub(logits, teacher, out=teacher).sub_(_line(statistics["mean"]))
        else:
            ratio = _log_ratio(teacher, logits, statistics)
            distance = log_mixture_(ratio, self.divergence.beta).neg_()
            distance.sub_(_line(statistics["student_to_mixture"]))
            grad = grad * (1.0 - self.divergence.beta)
        p = logits.sub_(lse).exp_()
        return distance.masked_fill_(p == 0.0, 0.0).mul_(p).mul_(grad)

    def student_lse(self, statistics: TokenStatistics) -> Tensor:
        """Return the logsumexp [N] of the student's logits."""
        return statistics["lse"]

    def values(self, statistics: TokenStatistics) -> Tensor:
        """Return what is differentiated: the divergence of each token, [1, N]."""
        if self.divergence.name == "js":
            beta = self.divergence.beta
            found = beta * statistics["teacher_to_mixture"]
            found = found + (1.0 - beta) * statistics["student_to_mixture"]
        else:
            apart = statistics["lse"] - statistics["teacher_lse"]
            found = statistics["mean"] + (apart if self.divergence.name == "forward_kl" else -apart)
        return found.unsqueeze(0)


def _log_ratio(teacher: Tensor, logits: Tensor, statistics: TokenStatistics) -> Tensor:
    """Return log(q / p) of a tile."""
    return (teacher - logits).sub_(_line(statistics["teacher_lse"] - statistics["lse"]))


def _line(per_token: Tensor) -> Tensor:
    return per_token.unsqueeze(1)
