"""The one face of every backend: a shard of rows in, statistics and gradients out.

A backend works on one rank's rows alone. It never communicates, never sees a group, and never
meets an empty shard, an empty batch or a padding row: those end before it.

The gradient of a logit follows from the statistics s of the whole vocabulary and the gradients d
that they receive (`statistics.py` names them): with p = exp(z - s.lse),

    dz = d.lse p + d.target [is target] + d.sum + d.expected p (z - s.lse - s.expected)

A target's own entry takes expm1(s.target - s.lse) for p - 1, so that a confident token, whose
d.lse p + d.target nearly cancels, keeps its precision.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from vocab_parallel.plan import BackwardPlan
from vocab_parallel.statistics import LSE, TARGET, Columns, accumulation_dtype


class Transform(NamedTuple):
    """From a product's raw entry x, the bias added, to a logit: cap tanh(x / cap) / temperature.

    Attributes:
        softcap: cap, or None for no tanh.
        temperature: divides the logit.
    """

    softcap: float | None = None
    temperature: float = 1.0


class Shard(NamedTuple):
    """One rank's share of the work: logits of its rows, for some tokens of the loss.

    All but the tensors is known of a call's shape: `of` makes a shard whose tensors hold nothing,
    and each call puts its own in.

    Attributes:
        hidden: [N, D].
        classifier: [R, D], the rows of this rank that are tokens; R > 0.
        bias: [R], or None.
        targets: [N] int32, the row in [0, R) of each token's target; outside of [0, R) where the
            target is another rank's row, or there is none.
        others: what a distillation reads beside these of the same tokens, [N, ...] each.
        beside: and what it reads of no token, the teacher's rows.
        transform: what makes logits of raw entries.
        columns: the statistics that are made.
        grad_columns: those of them, the first ones, that may receive a gradient.
        separate_lse_grad: whether the gradient of lse may differ from minus that of the target,
            as a z-loss or a use of lse makes it.
        dtype: of statistics and of accumulation: float32, or float64 for float64.
        product_dtype: in which hidden states and rows are multiplied: float32 where theirs are two.
        operand_dtype: in which a tile's operands are there. A GPU multiplies float16 and bfloat16
            into float32; a CPU has no such product, and widens the operands, which are small and
            then multiply faster.
        logits_dtype: of a tile of logits that a kernel reads or keeps, at least that of the
            products. Logits that stay in registers are float32.
        sum_dtype: in which the partial gradients of the hidden states are summed over the group,
            or their own where they are not. A backend that can writes that dtype.
        needs_grad: whether a backward may follow.
    """

    hidden: Tensor
    classifier: Tensor
    bias: Tensor | None
    targets: Tensor
    others: tuple[Tensor, ...]
    beside: tuple[Tensor | None, ...]
    transform: Transform
    columns: Columns
    grad_columns: Columns
    separate_lse_grad: bool
    dtype: torch.dtype
    product_dtype: torch.dtype
    operand_dtype: torch.dtype
    logits_dtype: torch.dtype
    sum_dtype: torch.dtype
    needs_grad: bool

    @classmethod
    def of(
        cls,
        hidden: Tensor,
        classifier: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        *,
        transform: Transform | None = None,
        columns: Columns = (LSE, TARGET),
        grad_columns: Columns | None = None,
        separate_lse_grad: bool = True,
        logits_dtype: torch.dtype | None = None,
        sum_dtype: torch.dtype | None = None,
    ) -> "Shard":
        """Describe a shard; what is not given follows from the tensors."""
        dtype = accumulation_dtype(hidden.dtype)
        product_dtype = torch.promote_types(hidden.dtype, classifier.dtype)
        return cls(
            hidden,
            classifier,
            bias,
            targets,
            (),
            (),
            transform or Transform(),
            columns,
            columns if grad_columns is None else grad_columns,
            separate_lse_grad,
            dtype,
            product_dtype,
            product_dtype if hidden.is_cuda else dtype,
            logits_dtype or product_dtype,
            sum_dtype or hidden.dtype,
            needs_grad=True,
        )

    @property
    def mixed(self) -> bool:
        """Whether hidden states and rows have two dtypes: a tile of either is widened."""
        return self.hidden.dtype != self.classifier.dtype


class Wanted(NamedTuple):
    """Which gradients a backward must produce; the products of the others are skipped."""

    hidden: bool
    classifier: bool
    bias: bool


class Gradients(NamedTuple):
    """What a backward produced: None where it was not wanted.

    ``hidden`` [N, D] is the partial sum over this rank's rows, in the dtype that the backend
    accumulated it in; ``classifier`` [R, D] is complete and in the dtype of `ClassifierGrad`;
    ``bias`` [R] is complete, in the parameter's dtype or wider.
    """

    hidden: Tensor | None
    classifier: Tensor | None
    bias: Tensor | None


class ClassifierGrad(NamedTuple):
    """Where the classifier's gradient [R, D] goes.

    Attributes:
        dtype: of the gradient.
        add_to: a tensor [R, D] of that dtype to which it is added, and which is then returned;
            None for a tensor of its own.
    """

    dtype: torch.dtype
    add_to: Tensor | None = None

    def placed(self, gradient: Tensor | None) -> Tensor | None:
        """Bring a finished gradient where it goes, for who cannot compute it there."""
        if gradient is None or self.add_to is None:
            return gradient if gradient is None else gradient.to(self.dtype)
        return self.add_to.add_(gradient)


class Upstream(NamedTuple):
    """What a backward is asked for; it writes to none of these but ``classifier_grad.add_to``.

    Attributes:
        statistics: [k, N], of the whole vocabulary, the columns that may receive a gradient.
        grads: [k, N], what each of them receives.
        wanted: the gradients to produce.
        classifier_grad: where that of the classifier goes.
        kept: what this backend's forward kept.
        when_hidden: takes the partial gradient [N, D] of the hidden states once it is final, so
            that its sum over the group runs beside the classifier's product. A backend may call it
            before it returns, or not.
    """

    statistics: Tensor
    grads: Tensor
    wanted: Wanted
    classifier_grad: ClassifierGrad
    kept: Any = None
    when_hidden: Callable[[Tensor], None] | None = None


@dataclass
class Kept:
    """What forward kept of the logits [N, r] of a shard's first rows, for backward to use once.

    Raw logits are turned into their gradient in place: under a split backward the inputs' half
    leaves them as they are, and the weights' half pops them. Exponentials of whole shards stay,
    but for their targets' places, where 0 is written. Who comes later (a backward that is run
    again) makes logits anew.

    Attributes:
        values: what was kept; None where it is gone.
        num_rows: r; the buffer may be wider.
        reference: [N], what exponentials are relative to, or None: raw logits are kept.
    """

    values: Tensor | None
    num_rows: int
    reference: Tensor | None

    def pop(self) -> Tensor | None:
        """Return what was kept and forget it; None where it is gone."""
        values, self.values = self.values, None
        return values


class Backend(Protocol):
    """One way to do the local work."""

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
        """Choose how backward finds the logits, equally on all ranks where ranks notice.

        They do where a long call communicates span by span. All else is a rank's own choice, by
        its own rows.

        Args:
            shard: this rank's rows, without tokens.
            tokens: N, those of the loss.
            most_rows: of the group's largest shard, equal on all ranks; None where nobody knows.
            degree: V, over how many ranks the rows are spread.
            backward: "auto", or one that the caller names.
            has_main_grad: whether the classifier's gradient is added to a ``main_grad``.

        Raises:
            ValueError: this backend cannot do what is asked, or nothing fits.
        """
        ...

    def statistics(self, shard: Shard, plan: BackwardPlan) -> tuple[Tensor, Any]:
        """Compute the statistics [k, N] of this shard's logits.

        The second of the pair is what the same backend's `gradients` is given back.
        """
        ...

    def gradients(self, shard: Shard, plan: BackwardPlan, upstream: Upstream) -> Gradients:
        """Return the wanted gradients."""
        ...
