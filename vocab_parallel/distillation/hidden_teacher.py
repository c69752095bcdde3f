"""A teacher that is given as hidden states and rows: its logits are made tile by tile.

With u the teacher's logits, z the student's, q = softmax(u) and p = softmax(z), what one pass over
the tiles accumulates with running maxima is

    forward_kl   E_q[u - z] - lse(u) + lse(z)      dz = g.lse p - g.mean q
    reverse_kl   E_p[z - u] - lse(z) + lse(u)      dz = p (g.mean (z - u - mean) + g.mean + g.lse)
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

from vocab_parallel.backends.interface import Shard
from vocab_parallel.backends.torch import Block, TorchBackend, finish_logits_
from vocab_parallel.distillation.comparison import Comparison
from vocab_parallel.distillation.divergences import log_mixture_
from vocab_parallel.distillation.labels import softmax_parts_
from vocab_parallel.plan import padded
from vocab_parallel.statistics import Column, Columns, Statistics

_PRODUCTS = TorchBackend()
# The second is reported alone, for the gradient of the first.
_TO_MIXTURE = (Column("js", "sum"), Column("student_to_mixture", "sum"))


@dataclass(frozen=True, kw_only=True)
class HiddenTeacher(Comparison):
    """Compares the student's logits with those of a teacher's shard.

    Of the shard's ``others`` the first are the teacher's hidden states [N, D'], and ``beside`` are
    its rows [R, D'] and their bias.

    Attributes:
        teacher: its shard, without tokens and rows.
    """

    teacher: Shard

    _TILES: ClassVar[dict[str, int]] = {"forward_kl": 4, "reverse_kl": 4, "js": 6}

    @property
    def own_columns(self) -> Columns:
        """See `Comparison.own_columns`."""
        lse = (Column("lse", "logsumexp"), Column("teacher_lse", "logsumexp"))
        if self.settings.divergence == "js":
            return lse
        under = "teacher_lse" if self.settings.divergence == "forward_kl" else "lse"
        return (*lse, Column("mean", "mean", under))

    @property
    def later_columns(self) -> Columns:
        """See `Comparison.later_columns`."""
        return _TO_MIXTURE if self.settings.divergence == "js" else ()

    @property
    def tiles(self) -> int:
        """The logits of both, their difference, a mixture, and a comparison with 0."""
        return self._TILES[self.settings.divergence]

    def own_statistics(self, logits: Tensor, block: Block, tokens: slice) -> list[Tensor]:
        """See `Comparison.own_statistics`."""
        teacher, name = self._logits(block, tokens), self.settings.divergence
        difference: Tensor | None = None
        if name != "js":
            difference = teacher - logits if name == "forward_kl" else logits - teacher
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

    def later_statistics(self, logits: Tensor, block: Block, tokens: slice) -> list[Tensor]:
        """See `Comparison.later_statistics`."""
        beta, teacher = self.settings.share, self._logits(block, tokens)
        first = Statistics(block.shard.others[-1][tokens].T, self.columns)
        lse, teacher_lse = first["lse"], first["teacher_lse"]
        ratio = _log_ratio(teacher, logits, lse, teacher_lse)
        q = teacher.sub_(teacher_lse.unsqueeze(1)).exp_()
        p = logits.sub_(lse.unsqueeze(1)).exp_()
        to_teacher = log_mixture_(-ratio, 1.0 - beta).masked_fill_(q == 0.0, 0.0).mul_(q).sum(1)
        to_student = log_mixture_(ratio, beta).masked_fill_(p == 0.0, 0.0).mul_(p).sum(1)
        return [-(beta * to_teacher + (1.0 - beta) * to_student), -to_student]

    def put_own_gradient(
        self, logits: Tensor, block: Block, tokens: slice, statistics: Tensor, grads: Tensor
    ) -> None:
        """See `Comparison.put_own_gradient`."""
        teacher, name = self._logits(block, tokens), self.settings.divergence
        lse, teacher_lse = (each.unsqueeze(1) for each in statistics[:2])
        if name == "forward_kl":
            q = teacher.sub_(teacher_lse).exp_().mul_(grads[2].unsqueeze(1))
            logits.sub_(lse).exp_().mul_(grads[0].unsqueeze(1)).sub_(q)
            return
        if name == "reverse_kl":
            mean, grad = statistics[2].unsqueeze(1), grads[2].unsqueeze(1)
            factor = torch.sub(logits, teacher, out=teacher).sub_(mean).mul_(grad)
            factor.add_(grad + grads[0].unsqueeze(1))
        else:
            ratio = _log_ratio(teacher, logits, statistics[0], statistics[1])
            factor = log_mixture_(ratio, self.settings.share).neg_()
            factor.sub_(statistics[3].unsqueeze(1))
            factor.mul_((grads[2] * (1.0 - self.settings.share)).unsqueeze(1))
        p = logits.sub_(lse).exp_()
        p.mul_(factor.masked_fill_(p == 0.0, 0.0))

    def divergences(self, statistics: Statistics, others: tuple[Tensor, ...]) -> Tensor:
        """See `Comparison.divergences`."""
        if self.settings.divergence == "js":
            return statistics["js"]
        apart = statistics["lse"] - statistics["teacher_lse"]
        return statistics["mean"] + (apart if self.settings.divergence == "forward_kl" else -apart)

    def _logits(self, block: Block, tokens: slice) -> Tensor:
        """Make the teacher's logits [n, r] of a tile, in the accumulation dtype."""
        hidden, (rows, bias) = block.shard.others[0], block.shard.beside
        assert rows is not None
        shard = self.teacher._replace(hidden=hidden, classifier=rows, bias=bias)
        own, num_rows = _PRODUCTS.block(shard, block.rows), block.rows.stop - block.rows.start
        # cuBLAS is slow where lines of the result are not aligned.
        pitch = padded(num_rows) if hidden.is_cuda else num_rows
        shape = (tokens.stop - tokens.start, pitch)
        out = hidden.new_empty(shape, dtype=shard.dtype)[:, :num_rows]
        return finish_logits_(_PRODUCTS.put_raw_logits(out, own, tokens), own)


def _log_ratio(teacher: Tensor, logits: Tensor, lse: Tensor, teacher_lse: Tensor) -> Tensor:
    """Return log(q / p) of a tile."""
    return (teacher - logits).sub_((teacher_lse - lse).unsqueeze(1))
