"""What cannot be right where all stages carry the vocabulary, said on every rank before it hangs.

Between the first and the last action of a step no rank may raise: the others would wait for it. So
all that a user can get wrong is found, and agreed on, before.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from stage_groups import StageGroups
from vocab_parallel.agreement import RankSummary, agree
from vocab_parallel.collectives import VocabGroup
from vocab_parallel.layout import target_digest
from vocab_parallel.modules.classifier import VocabParallelClassifier
from vocab_parallel.modules.embedding import VocabParallelEmbedding
from vocab_parallel.modules.vocab_rows import VocabRows
from vocab_parallel.pipeline.pipeline_loss import CCEPipelineLoss
from vocab_parallel.pipeline.problems import DIVIDED_TWICE, check_loss, check_stages
from vocab_parallel.pipeline.spanning.owners import Owners
from vocab_parallel.pipeline.spanning.passes import barriers_of
from vocab_parallel.settings import check_token_divisor

SCHEDULES = ("1F1B", "Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble", "ZBVZeroBubble")
_IMPLS = ("auto", "chunked", "reference")
_UNWRAPPED = (
    "does not see the gradients that the schedule itself adds to the rows: leave it out, and "
    "reduce the gradients over the data group after the step"
)


@dataclass(frozen=True)
class ScheduleArguments:
    """What a rank gives a `SpanningSchedule`; its constructor explains each."""

    stages: list[Any]
    num_microbatches: int
    loss: Any
    groups: Any
    schedule: str
    embedding: Any
    barriers: int | None
    scale_grads: bool


def agree_on_schedule(given: ScheduleArguments) -> None:
    """Refuse on every rank what cannot be right on one; all ranks of the pipeline call.

    Communicates what `agree` does, over the vocab group.

    Raises:
        ValueError: groups whose vocab group is not that of all stages (on the ranks that were
            given them); an unknown schedule, or one that cannot span; a loss that is no
            `CCEPipelineLoss`, or whose options cannot be; rows that are no parameters of exactly
            one stage of the rank, or of another group; and what `validate_pipeline_loss` refuses.
    """
    groups = given.groups
    if not isinstance(groups, StageGroups) or groups.message_groups is None:
        raise ValueError(
            "groups must be built with vocab_over='all_stages', so that the vocab group is that of "
            "all stages: build_stage_groups(pipeline, vocab, vocab_over='all_stages')"
        )
    problem: ValueError | None = None
    claim, alike = RankSummary(), dict[str, Any]()
    try:
        _check_schedule(given)
        check_stages(given.stages, given.scale_grads, _UNWRAPPED)
        # Our passes accumulate by themselves, whichever half autograd runs.
        check_loss(given.loss, given.scale_grads, splits=False)
        _check_rows("classifier", given.loss.output_weight.owner, VocabParallelClassifier, given)
        for stage in given.stages:
            given.loss.output_weight.check_vocab_size(stage.submod)
        if given.embedding is not None:
            _check_rows("embedding", given.embedding, VocabParallelEmbedding, given)
        _check_ends(given)
        rows = given.loss.output_weight.owner
        claim, alike = RankSummary(rows.start, rows.stop, rows.vocab_size), _alike(given)
    except ValueError as error:
        problem = error
    agree(problem, claim, alike, VocabGroup.of(groups.vocab_group))


def _check_schedule(given: ScheduleArguments) -> None:
    """Check what is asked of the schedule, and of the loss."""
    stage, number = given.stages[0], len(given.stages)
    if given.schedule not in SCHEDULES:
        raise ValueError(
            f"unknown schedule {given.schedule!r}: those that can span are {list(SCHEDULES)}"
        )
    if given.schedule == "1F1B" and number != 1:
        raise ValueError(f"1F1B has one stage a rank, got {number}: use Interleaved1F1B")
    if given.schedule == "ZBVZeroBubble":
        if number != 2:
            raise ValueError(f"ZBVZeroBubble has two stages a rank, got {number}")
        on_cpu = torch.device(stage.device).type == "cpu"
        if on_cpu and not hasattr(PipelineStage, "_is_same_rank"):
            raise ValueError(
                f"torch {torch.__version__} sends a message between the two stages of one rank, "
                f"which gloo cannot: ZBVZeroBubble on a CPU needs torch 2.13 or newer"
            )
    if not isinstance(given.num_microbatches, int) or given.num_microbatches < 1:
        raise ValueError(
            f"n_microbatches must be a positive integer, got {given.num_microbatches!r}"
        )
    if stage.group_size != given.groups.pipeline_degree:
        raise ValueError(
            f"the stages' group has {stage.group_size} ranks, but the pipeline "
            f"{given.groups.pipeline_degree}: build them with group=groups.pipeline_group"
        )
    if not isinstance(given.loss, CCEPipelineLoss):
        raise ValueError(
            f"every rank computes its share of the loss: loss_fn must be a CCEPipelineLoss of its "
            f"rows, got {type(given.loss).__name__}"
        )
    settings = given.loss.settings
    for name, wrong in (
        ("shift", settings.num_heads is not None),
        ("hidden_layout", settings.hidden_layout == "sequence"),
        ("impl", settings.impl not in _IMPLS),
    ):
        if wrong:
            raise ValueError(
                f"a loss over all stages does not take {name}={getattr(settings, name)!r}: leave "
                f"it out, or give the vocabulary to the last stage alone"
            )
    if given.barriers not in (None, 1, 2):
        raise ValueError(f"barriers must be 1, 2 or None, got {given.barriers!r}")
    if given.barriers == 1 and barriers_of(settings) == 2:
        raise ValueError(
            "label_smoothing needs barriers=2: what it adds to a logit's gradient is not known "
            "of a rank's own statistics alone"
        )


def _check_rows(name: str, module: Any, kind: type[VocabRows], given: ScheduleArguments) -> None:
    """Check this rank's rows of the classifier or the embedding."""
    if not isinstance(module, kind):
        raise ValueError(
            f"the {name} over all stages must be a {kind.__name__}, got {type(module).__name__}"
        )
    group = VocabGroup.of(module.group)
    if group.degree != given.groups.vocab_degree or group.rank != given.groups.vocab_rank:
        raise ValueError(
            f"the {name}'s rows are those of a group of {group.degree} ranks, but all stages' "
            f"group has {given.groups.vocab_degree}: build it with group=groups.vocab_group"
        )
    rows = list(module.row_parameters())
    if any(isinstance(each, DTensor) or not isinstance(each, nn.Parameter) for each in rows):
        raise ValueError(
            f"the {name}'s rows must be plain parameters, not DTensors or parametrized"
        )
    owners = [
        stage.stage_index
        for stage in given.stages
        if any(each is own for each in rows for own in stage.submod.parameters())
    ]
    if rows and len(owners) != 1:
        raise ValueError(
            f"the {name}'s rows must be parameters of exactly one stage's module of each rank, "
            f"which scales their gradient once, but they are of the stages {owners}"
        )


def _check_ends(given: ScheduleArguments) -> None:
    """Check what the classifier may not have, alone and beside the embedding."""
    classifier, embedding = given.loss.output_weight.owner, given.embedding
    if classifier.low_rank is not None:
        raise ValueError(
            "the classifier has an adapter, whose gradient would need the hidden states on every "
            "rank: merge it, or give the vocabulary to the last stage alone"
        )
    if embedding is None:
        return
    if embedding.hidden_size != classifier.hidden_size:
        raise ValueError(
            f"the embedding's hidden size is {embedding.hidden_size}, the classifier's "
            f"{classifier.hidden_size}: they must come from one model"
        )
    if embedding.weight is classifier.weight and given.loss.accumulate_into == "main_grad":
        raise ValueError(
            'accumulate_into="main_grad" is of the classifier\'s gradient alone, and the tied '
            "embedding's would lie in .grad: leave it out"
        )


def _alike(given: ScheduleArguments) -> dict[str, Any]:
    """Name what must be equal on all ranks, in words."""
    classifier, embedding = given.loss.output_weight.owner, given.embedding
    rows = {
        f"vocabulary, hidden size, dtypes and requires_grad of the {name}": (
            module.vocab_size,
            module.hidden_size,
            [(str(own.dtype), own.requires_grad) for own in module.parameters()],
        )
        for name, module in (("classifier", classifier), ("embedding", embedding))
        if module is not None
    }
    return {
        "schedule": given.schedule,
        "n_microbatches": given.num_microbatches,
        "barriers": given.barriers,
        "scale_grads": given.scale_grads,
        "stages a rank": len(given.stages),
        "tied": embedding is not None and embedding.weight is classifier.weight,
        **rows,
        **{f"{name} of the loss": value for name, value in vars(given.loss.settings).items()},
    }


class Split(NamedTuple):
    """A step's inputs that are split already, as torch's schedules take them since 2.14.

    Attributes:
        arg_mbs, kwarg_mbs, target_mbs: of each microbatch; or None.
    """

    arg_mbs: Any
    kwarg_mbs: Any
    target_mbs: Any

    def whole(self, given: ScheduleArguments) -> tuple[tuple[Tensor, ...], Tensor]:
        """Return what all ranks need of the whole batch: (ids,) where they embed, and labels.

        Raises:
            ValueError: no M tuples, dicts or tensors, or tensors that make no batch.
        """
        count, spans = given.num_microbatches, given.embedding is not None
        for name, every, kind, needed in (
            ("arg_mbs", self.arg_mbs, tuple, spans),
            ("kwarg_mbs", self.kwarg_mbs, dict, False),
            ("target_mbs", self.target_mbs, Tensor, True),
        ):
            if every is None and not needed:
                continue
            got = [type(one).__name__ for one in every] if isinstance(every, list) else type(every)
            right = isinstance(got, list) and len(every) == count
            if not right or not all(isinstance(one, kind) for one in every):
                raise ValueError(
                    f"every rank needs {name} as a list of {count} {kind.__name__}s, one for each "
                    f"microbatch of its column, got {got}"
                )
        named = {"labels (target_mbs)": self.target_mbs}
        if spans:
            if not all(len(one) == 1 and isinstance(one[0], Tensor) for one in self.arg_mbs):
                raise ValueError("each of arg_mbs must be (ids [b, T],) and nothing else")
            named["ids (arg_mbs)"] = [ids for (ids,) in self.arg_mbs]
        for name, tensors in named.items():
            kinds = {(tuple(one.shape), one.dtype, one.device) for one in tensors}
            if len(kinds) > 1 or not tensors[0].dim():
                raise ValueError(
                    f"the {name} must be [b, T] each, of one shape, dtype and device, got {kinds}"
                )
        labels, *ids = (torch.cat(tensors) for tensors in named.values())
        return tuple(ids), labels


@dataclass(frozen=True)
class StepInputs:
    """What every rank needs of a step's inputs.

    Attributes:
        labels: [n b, T] of all columns, of each microbatch.
        ids: likewise, where the embedding spans too; else None.
        token_weight: [n b, T] of every microbatch, or None.
        num_valid_tokens: divides the mean.
        shapes: of this rank's labels, and of all other tensors that the step was given.
        changed: whether they are others than those known, on any rank; known only where it was
            agreed on.
    """

    labels: list[Tensor]
    ids: list[Tensor] | None
    token_weight: Tensor | None
    num_valid_tokens: int | Tensor | None
    shapes: list[Any]
    changed: bool


def step_inputs(
    given: ScheduleArguments,
    last: Owners,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    target: Any,
    loss_kwargs: dict[str, Any] | None,
    split: Split | None,
    *,
    trains: bool,
    known: list[Any] | None,
) -> StepInputs:
    """Return what a step needs, gathered over the columns; all ranks of all stages call.

    On a CPU, where no shapes are known and where the labels have another one, it agrees over all
    ranks that all is right, which waits for a GPU.

    Args:
        given: of the schedule.
        last: the last stage's ranks.
        args, kwargs, target, loss_kwargs: of ``step``.
        split: the inputs that are split already, in place of args, kwargs and target.
        trains: whether a backward follows.
        known: the shapes of the step before, if there was one.

    Raises:
        ValueError: on every rank where it agrees.
    """
    loss, group = given.loss, VocabGroup.of(given.groups.vocab_group)
    divisor = (loss_kwargs or {}).get("num_valid_tokens", loss.num_valid_tokens)
    validate = known is None or loss.output_weight.tensors[0].is_cpu
    inputs: Any = split or (args, kwargs)
    problem: ValueError | None = None
    shapes, tensors = list[Any](), list[Tensor]()
    claim, alike = RankSummary(), dict[str, Any]()
    try:
        if split is not None:
            if args or kwargs or target is not None:
                raise ValueError(
                    "step takes inputs and labels of the whole batch, or arg_mbs, kwarg_mbs and "
                    "target_mbs of each microbatch, and was given both: leave one out"
                )
            args, target = split.whole(given)
        leaves = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
        shapes = [getattr(target, "shape", None), *(leaf.shape for leaf in leaves)]
        # The labels' shape changes on all ranks; where there are no labels, others do not agree.
        validate |= known is not None and shapes[0] not in (None, known[0])
        tensors = _checked_tensors(given, args, target, loss_kwargs)
        check_token_divisor(divisor, target, loss.settings.reduction, reads_values=validate)
        if divisor is not None and given.scale_grads:
            raise ValueError(DIVIDED_TWICE)
        if validate:
            claim, alike = _claimed(given, tensors, divisor, trains)
    except ValueError as error:
        problem = error
    if validate:
        agree(problem, claim, alike, group)
    elif problem is not None:
        raise problem
    of_all = [last.gather_columns(own) for own in tensors]
    changed = False
    if validate:
        told = group.exchange_integers([shapes != known, *map(target_digest, of_all)])
        changed = bool(told[:, 0].any())
        if (told[:, 1:] != told[0, 1:]).any():
            raise ValueError(
                f"the ranks of a column must be given the same ids and labels, and with "
                f'hidden_layout="replicated" those of all columns, but their checksums are '
                f"{told[:, 1:].tolist()}"
            )
    # [n B, T] of all columns, in microbatches [n b, T]
    cut = [own.unflatten(0, (last.parts, given.num_microbatches, -1)) for own in of_all]
    labels, *ids = ([each.flatten(0, 1) for each in own.unbind(1)] for own in cut)
    weight = loss.token_weight
    if weight is not None:
        weight = last.gather_columns(weight)
    return StepInputs(labels, ids[0] if ids else None, weight, divisor, shapes, changed)


def _checked_tensors(
    given: ScheduleArguments, args: Sequence[Any], target: Any, loss_kwargs: dict[str, Any] | None
) -> list[Tensor]:
    """Check this rank's inputs of a step; return its labels [B, T], and ids where it needs them."""
    known = {"num_valid_tokens"}
    if loss_kwargs and set(loss_kwargs) - known:
        raise ValueError(f"loss_kwargs has {sorted(loss_kwargs)}: known is {sorted(known)}")
    named = {"the labels (target=)": target}
    if given.embedding is not None:
        if len(args) != 1:
            raise ValueError(
                f"every rank looks up its rows of the embedding: give step the ids [b, T] of its "
                f"column and nothing else by position, got {len(args)} arguments"
            )
        named["the ids"] = args[0]
    device = given.loss.output_weight.tensors[0].device
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor) or tensor.dtype not in (torch.int32, torch.int64):
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(
                f"every rank needs {name} of its column, as an int32 or int64 tensor, got {kind}"
            )
        if tensor.dim() < 2 or tensor.shape[0] % given.num_microbatches or not tensor.numel():
            raise ValueError(
                f"{name} must be [b, T] with b a multiple of {given.num_microbatches} "
                f"microbatches, got {list(tensor.shape)}"
            )
        if tensor.device != device:
            raise ValueError(f"{name} must be on {device} as the rows are, got {tensor.device}")
    shift = given.loss.settings.shift
    if not 0 <= shift < target.shape[-1]:
        raise ValueError(f"shift={shift} needs sequences that are longer, got {target.shape[-1]}")
    weight = given.loss.token_weight
    wanted = [target.shape[0] // given.num_microbatches, *target.shape[1:]]
    if weight is not None and list(weight.shape) != wanted:
        raise ValueError(
            f"token_weight must have the shape of a microbatch's labels {wanted}, got "
            f"{list(weight.shape)}"
        )
    return list(named.values())


def _claimed(
    given: ScheduleArguments, tensors: Sequence[Tensor], divisor: Any, trains: bool
) -> tuple[RankSummary, dict[str, Any]]:
    """Return what this rank says of its rows, labels and ids, and what all ranks must have."""
    options, (labels, *ids) = given.loss.output_weight.read().options, tensors
    ignored = labels.long() == given.loss.settings.ignore_index
    tokens = [labels.masked_fill(ignored, 0), *ids]  # 0 is a token of every vocabulary
    ends = torch.cat([each.flatten() for each in tokens]).aminmax()
    claim = RankSummary(options.start, options.stop, options.vocab_size, *map(int, ends))
    return claim, {
        "shape of the labels": list(labels.shape),
        "dtype of the labels": labels.dtype,
        "shape of the ids": [list(each.shape) for each in ids],
        "num_valid_tokens": divisor.tolist() if isinstance(divisor, Tensor) else divisor,
        "training": trains,
    }


def agree_on_shapes(
    stages: Sequence[Any], labels: Tensor, given: ScheduleArguments, last: Owners
) -> Tensor:
    """Return a tensor without memory, as the last stage's hidden states are; all ranks call.

    Communicates one small object a rank, and waits for it.

    Args:
        stages: of this rank, whose shapes torch has inferred.
        labels: [n b, T] of a microbatch.
        given, last: of the schedule.

    Raises:
        ValueError: on every rank, hidden states that do not fit labels or rows.
    """
    own = next((_hidden_of(stage) for stage in stages if stage.is_last), None)
    told = VocabGroup.of(given.groups.vocab_group).exchange_objects(own)
    known = sorted({each for each in told if each is not None}, key=str)
    shape, dtype = known[0]
    rows = given.loss.output_weight.read().weight
    wanted = (labels.shape[0] // last.parts, *labels.shape[1:], rows.shape[1])
    casts = torch.is_autocast_enabled(rows.device.type)
    if len(known) > 1 or shape != wanted or (dtype != rows.dtype and not casts):
        raise ValueError(
            f"the last stage must return hidden states {list(wanted)} in {rows.dtype} for a "
            f"microbatch's labels and the classifier's rows, but returns "
            f"{'; '.join(f'{list(one)} in {kind}' for one, kind in known)}: give step inputs and "
            f"labels of one length"
        )
    return torch.empty((), dtype=dtype, device=labels.device).expand(shape)


def _hidden_of(stage: Any) -> tuple[tuple[int, ...], torch.dtype]:
    """Return what a stage knows of its first output's shape and dtype."""
    known = getattr(stage, "_stage_meta", None)  # since torch 2.13
    outputs = stage.get_outputs_meta() if known is None else known.outputs
    return tuple(outputs[0].shape), outputs[0].dtype
