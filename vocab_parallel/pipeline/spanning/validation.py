"""What cannot be right where all stages carry the vocabulary, said on every rank before it hangs.

Between the first and the last action of a step no rank may raise: the others would wait for it. So
all that a user can get wrong is found, and agreed on, before.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.tensor import DTensor

from stage_groups import StageGroups
from vocab_parallel.agreement import RankSummary, agree
from vocab_parallel.collectives import VocabGroup
from vocab_parallel.layout import target_digest, target_range
from vocab_parallel.modules.classifier import VocabParallelClassifier
from vocab_parallel.modules.embedding import VocabParallelEmbedding
from vocab_parallel.modules.vocab_rows import VocabRows
from vocab_parallel.pipeline.pipeline_loss import CCEPipelineLoss
from vocab_parallel.pipeline.problems import (
    DIVIDED_TWICE,
    data_parallel_wrapper,
    problem_of_loss,
    problem_of_stages,
)
from vocab_parallel.pipeline.spanning.owners import Owners
from vocab_parallel.pipeline.spanning.passes import barriers_of
from vocab_parallel.settings import check_token_divisor

SCHEDULES = ("1F1B", "Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble", "ZBVZeroBubble")
_IMPLS = ("auto", "chunked", "reference")


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
    group = VocabGroup.of(groups.vocab_group)
    text = next(filter(None, _problems(given)), None)
    if text is not None:
        agree(ValueError(text), RankSummary(), {}, group)
    rows = given.loss.output_weight.owner
    agree(None, RankSummary(rows.start, rows.stop, rows.vocab_size), _alike(given), group)


def _problems(given: ScheduleArguments) -> Any:
    """Yield what is wrong on this rank; each check trusts those before it."""
    yield _problem_of_kinds(given)
    yield _problem_of_options(given)
    yield problem_of_stages(given.stages, given.scale_grads, splits=False)
    yield _problem_of_wrappers(given)
    # Our passes accumulate by themselves, whichever half autograd runs.
    yield problem_of_loss(given.loss, given.scale_grads, splits=False)
    yield _problem_of_rows("classifier", given.loss.output_weight.owner, given)
    yield _problem_of_vocab_size(given)
    if given.embedding is not None:
        yield _problem_of_rows("embedding", given.embedding, given)


def _problem_of_kinds(given: ScheduleArguments) -> str | None:
    if given.schedule not in SCHEDULES:
        return f"unknown schedule {given.schedule!r}: those that can span are {list(SCHEDULES)}"
    number = len(given.stages)
    if given.schedule == "1F1B" and number != 1:
        return f"1F1B has one stage a rank, got {number}: use Interleaved1F1B"
    if given.schedule == "ZBVZeroBubble" and number != 2:
        return f"ZBVZeroBubble has two stages a rank, got {number}"
    on_cpu = torch.device(given.stages[0].device).type == "cpu"
    if given.schedule == "ZBVZeroBubble" and on_cpu and not hasattr(PipelineStage, "_is_same_rank"):
        return (
            f"torch {torch.__version__} sends a message between the two stages of one rank, which "
            f"gloo cannot: ZBVZeroBubble on a CPU needs torch 2.13 or newer"
        )
    if not isinstance(given.num_microbatches, int) or given.num_microbatches < 1:
        return f"n_microbatches must be a positive integer, got {given.num_microbatches!r}"
    if not isinstance(given.loss, CCEPipelineLoss):
        return (
            f"every rank computes its share of the loss: loss_fn must be a CCEPipelineLoss of its "
            f"rows, got {type(given.loss).__name__}"
        )
    if given.stages[0].group_size != given.groups.pipeline_degree:
        return (
            f"the stages' group has {given.stages[0].group_size} ranks, but the pipeline "
            f"{given.groups.pipeline_degree}: build them with group=groups.pipeline_group"
        )
    return None


def _problem_of_wrappers(given: ScheduleArguments) -> str | None:
    for stage in given.stages:
        wrapper = data_parallel_wrapper(stage.submod)
        if wrapper is not None:
            return (
                f"{wrapper} does not see the gradients that the schedule itself adds to the rows: "
                f"leave it out, and reduce the gradients over the data group after the step"
            )
    return None


def _problem_of_options(given: ScheduleArguments) -> str | None:
    """Say which of the loss's options cannot span, or None."""
    settings = given.loss.settings
    for name, wrong in (
        ("shift", settings.num_heads is not None),
        ("hidden_layout", settings.hidden_layout == "sequence"),
        ("impl", settings.impl not in _IMPLS),
    ):
        if wrong:
            return (
                f"a loss over all stages does not take {name}={getattr(settings, name)!r}: leave "
                f"it out, or give the vocabulary to the last stage alone"
            )
    if given.barriers not in (None, 1, 2):
        return f"barriers must be 1, 2 or None, got {given.barriers!r}"
    if given.barriers == 1 and barriers_of(settings) == 2:
        return (
            "label_smoothing needs barriers=2: what it adds to a logit's gradient is not known "
            "of a rank's own statistics alone"
        )
    return None


def _problem_of_rows(name: str, module: Any, given: ScheduleArguments) -> str | None:
    """Say what is wrong with this rank's rows of the classifier or the embedding, or None."""
    kind = VocabParallelClassifier if name == "classifier" else VocabParallelEmbedding
    if not isinstance(module, kind):
        return f"the {name} over all stages must be a {kind.__name__}, got {type(module).__name__}"
    group = VocabGroup.of(module.group)
    if group.degree != given.groups.vocab_degree or group.rank != given.groups.vocab_rank:
        return (
            f"the {name}'s rows are those of a group of {group.degree} ranks, but all stages' "
            f"group has {given.groups.vocab_degree}: build it with group=groups.vocab_group"
        )
    rows = list(module.row_parameters())
    if any(isinstance(each, DTensor) or not isinstance(each, nn.Parameter) for each in rows):
        return f"the {name}'s rows must be plain parameters, not DTensors or parametrized"
    if isinstance(module, VocabParallelClassifier) and module.low_rank is not None:
        return (
            "the classifier has an adapter, whose gradient would need the hidden states on every "
            "rank: merge it, or give the vocabulary to the last stage alone"
        )
    owners = [
        stage.stage_index
        for stage in given.stages
        if any(each is own for each in rows for own in stage.submod.parameters())
    ]
    if rows and len(owners) != 1:
        return (
            f"the {name}'s rows must be parameters of exactly one stage's module of each rank, "
            f"which scales their gradient once, but they are of the stages {owners}"
        )
    if isinstance(module, VocabParallelEmbedding):
        return _problem_of_tied(module, given.loss)
    return None


def _problem_of_vocab_size(given: ScheduleArguments) -> str | None:
    """Say that the configuration of a stage's module has more tokens than there are rows."""
    try:
        for stage in given.stages:
            given.loss.output_weight.check_vocab_size(stage.submod)
    except ValueError as error:
        return str(error)
    return None


def _problem_of_tied(embedding: VocabParallelEmbedding, loss: CCEPipelineLoss) -> str | None:
    classifier: Any = loss.output_weight.owner
    if embedding.hidden_size != classifier.hidden_size:
        return (
            f"the embedding's hidden size is {embedding.hidden_size}, the classifier's "
            f"{classifier.hidden_size}: they must come from one model"
        )
    if embedding.weight is classifier.weight and loss.accumulate_into == "main_grad":
        return (
            'accumulate_into="main_grad" is of the classifier\'s gradient alone, and the tied '
            "embedding's would lie in .grad: leave it out"
        )
    return None


def _alike(given: ScheduleArguments) -> dict[str, Any]:
    """Name what must be equal on all ranks, in words."""
    classifier, embedding = given.loss.output_weight.owner, given.embedding
    modules: dict[str, VocabRows | None] = {"classifier": classifier, "embedding": embedding}
    sizes = {
        name: None if module is None else (module.vocab_size, module.hidden_size)
        for name, module in modules.items()
    }
    dtypes = {
        name: None if module is None else str(next(module.parameters()).dtype)
        for name, module in modules.items()
    }
    trained = [
        None if module is None else any(own.requires_grad for own in module.parameters())
        for module in modules.values()
    ]
    return {
        "schedule": given.schedule,
        "n_microbatches": given.num_microbatches,
        "barriers": given.barriers,
        "scale_grads": given.scale_grads,
        "stages a rank": len(given.stages),
        "vocabulary and hidden size": sizes,
        "dtype of the rows": dtypes,
        "rows require grad": trained,
        "tied": embedding is not None and embedding.weight is classifier.weight,
        **{f"{name} of the loss": value for name, value in vars(given.loss.settings).items()},
    }


@dataclass(frozen=True)
class StepInputs:
    """What every rank needs of a step's inputs.

    Attributes:
        labels: [n b, T] of all columns, of each microbatch.
        ids: likewise, where the embedding spans too; else None.
        token_weight: [n b, T] of every microbatch, or None.
        num_valid_tokens: divides the mean.
    """

    labels: list[Tensor]
    ids: list[Tensor] | None
    token_weight: Tensor | None
    num_valid_tokens: int | Tensor | None


def step_inputs(
    given: ScheduleArguments,
    last: Owners,
    args: Sequence[Any],
    target: Any,
    loss_kwargs: dict[str, Any] | None,
    problem: ValueError | None,
    *,
    trains: bool,
    validate: bool,
) -> StepInputs:
    """Return what a step needs, gathered over the columns; all ranks of all stages call.

    Args:
        given: of the schedule.
        last: the last stage's ranks.
        args, target, loss_kwargs: of ``step``.
        problem: what is wrong with this rank's microbatches already.
        trains: whether a backward follows.
        validate: whether to agree over all ranks that it is right, which waits for a GPU.

    Raises:
        ValueError: on every rank where ``validate`` holds.
    """
    loss, group = given.loss, VocabGroup.of(given.groups.vocab_group)
    divisor = loss.num_valid_tokens
    if loss_kwargs:
        divisor = loss_kwargs.get("num_valid_tokens", divisor)
    if problem is None:
        problem = _problem_of_step(given, args, target, loss_kwargs, divisor, validate)
    ids = args[0] if given.embedding is not None and problem is None else None
    if validate:
        agree(problem, *_claimed(given, target, ids, divisor, trains, problem), group)
    elif problem is not None:
        raise problem
    every = [None if own is None else last.gather_columns(own) for own in (target, ids)]
    if validate:
        for of_all in every:
            _agree_on_values(of_all, group)
    labels, all_ids = (
        None if own is None else _microbatches(own, last.parts, given.num_microbatches)
        for own in every
    )
    assert labels is not None
    weight = loss.token_weight
    if weight is not None:
        weight = last.gather_columns(weight)
    return StepInputs(labels, all_ids, weight, divisor)


def problem_of_microbatches(
    given: ScheduleArguments, whole: bool, arg_mbs: Any, kwarg_mbs: Any, target_mbs: Any
) -> ValueError | None:
    """Say what is wrong with a step's inputs that are split already, or None.

    Args:
        given: of the schedule.
        whole: whether inputs or labels of a whole batch came too.
        arg_mbs, kwarg_mbs, target_mbs: of ``step``.
    """
    if whole:
        return ValueError(
            "step takes inputs and labels of the whole batch, or arg_mbs, kwarg_mbs and target_mbs "
            "of each microbatch, and was given both: leave one out"
        )
    count, spans = given.num_microbatches, given.embedding is not None
    for name, every, kind, needed in (
        ("arg_mbs", arg_mbs, tuple, spans),
        ("kwarg_mbs", kwarg_mbs, dict, False),
        ("target_mbs", target_mbs, Tensor, True),
    ):
        if every is None and not needed:
            continue
        got = [type(one).__name__ for one in every] if isinstance(every, list) else type(every)
        right = isinstance(got, list) and len(every) == count
        if not right or not all(isinstance(one, kind) for one in every):
            return ValueError(
                f"every rank needs {name} as a list of {count} {kind.__name__}s, one for each "
                f"microbatch of its column, got {got}"
            )
    if spans and not all(len(one) == 1 and isinstance(one[0], Tensor) for one in arg_mbs):
        return ValueError("each of arg_mbs must be (ids [b, T],) and nothing else")
    for name, tensors in (
        ("labels (target_mbs)", target_mbs),
        ("ids (arg_mbs)", [one[0] for one in arg_mbs] if spans else []),
    ):
        kinds = {(tuple(one.shape), one.dtype, one.device) for one in tensors}
        if any(not one.dim() for one in tensors):
            return ValueError(f"the {name} must be [b, T] each, got numbers")
        if len(kinds) > 1:
            return ValueError(f"the {name} must have one shape, dtype and device, got {kinds}")
    return None


def _problem_of_step(
    given: ScheduleArguments,
    args: Sequence[Any],
    target: Any,
    loss_kwargs: dict[str, Any] | None,
    divisor: Any,
    validate: bool,
) -> ValueError | None:
    """Say what is wrong with this rank's inputs of a step."""
    try:
        _check_step(given, args, target, loss_kwargs)
        check_token_divisor(divisor, target, given.loss.settings.reduction, reads_values=validate)
        if divisor is not None and given.scale_grads:
            raise ValueError(DIVIDED_TWICE)
    except ValueError as error:
        return error
    return None


def _check_step(
    given: ScheduleArguments,
    args: Sequence[Any],
    target: Any,
    loss_kwargs: dict[str, Any] | None,
) -> None:
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
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor) or tensor.dtype not in (torch.int32, torch.int64):
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(
                f"every rank needs {name} of its column, as an int32 or int64 tensor, got {kind}"
            )
        if tensor.dim() < 2 or tensor.shape[0] % given.num_microbatches or not tensor.shape[0]:
            raise ValueError(
                f"{name} must be [b, T] with b a multiple of {given.num_microbatches} "
                f"microbatches, got {list(tensor.shape)}"
            )
        device = given.loss.output_weight.tensors[0].device
        if tensor.device != device:
            raise ValueError(f"{name} must be on {device} as the rows are, got {tensor.device}")
    shift = given.loss.settings.shift
    if not 0 <= shift < max(target.shape[-1], 1):
        raise ValueError(f"shift={shift} needs sequences that are longer, got {target.shape[-1]}")
    weight = given.loss.token_weight
    wanted = [target.shape[0] // given.num_microbatches, *target.shape[1:]]
    if weight is not None and list(weight.shape) != wanted:
        raise ValueError(
            f"token_weight must have the shape of a microbatch's labels {wanted}, got "
            f"{list(weight.shape)}"
        )


def _claimed(
    given: ScheduleArguments,
    target: Any,
    ids: Tensor | None,
    divisor: Any,
    trains: bool,
    problem: ValueError | None,
) -> tuple[RankSummary, dict[str, Any]]:
    """Return what this rank says of its rows and labels, and what must be equal on all ranks."""
    options = given.loss.output_weight.read().options
    rows = (options.start, options.stop, options.vocab_size)
    if problem is not None:
        return RankSummary(*rows), {}
    lowest, highest = target_range(target, given.loss.settings.ignore_index)
    if ids is not None and ids.numel():  # an id is a token too, and has no ignore_index
        ends = [int(end) for end in torch.stack(torch.aminmax(ids)).tolist()]
        present = highest >= lowest
        lowest, highest = min(ends[0], lowest) if present else ends[0], max(ends[1], highest)
    return RankSummary(*rows, lowest, highest), {
        "shape of the labels": list(target.shape),
        "dtype of the labels": target.dtype,
        "shape of the ids": None if ids is None else list(ids.shape),
        "num_valid_tokens": divisor.tolist() if isinstance(divisor, Tensor) else divisor,
        "training": trains,
    }


def _agree_on_values(of_all: Tensor | None, group: VocabGroup) -> None:
    """Refuse labels or ids [n B, T] of all columns that differ between pipeline ranks."""
    if of_all is None:
        return
    digests = group.exchange_integers([target_digest(of_all)])[:, 0].tolist()
    if len(set(digests)) > 1:
        raise ValueError(
            f"the ranks of a column must be given the same ids and labels, and with "
            f'hidden_layout="replicated" those of all columns, but their checksums are {digests}'
        )


def _microbatches(of_all: Tensor, parts: int, count: int) -> list[Tensor]:
    """Cut [n B, T] of all columns into microbatches [n b, T]."""
    cut = of_all.unflatten(0, (parts, count, -1))
    return [cut[:, number].flatten(0, 1) for number in range(count)]


def differs_somewhere(differs: bool, given: ScheduleArguments) -> bool:
    """Tell whether something is so on any rank; all ranks call, and wait for one integer each."""
    group = VocabGroup.of(given.groups.vocab_group)
    return bool(group.exchange_integers([int(differs)]).any())


def agree_on_shapes(
    own: tuple[torch.Size, torch.dtype] | None,
    labels: Tensor,
    given: ScheduleArguments,
    last: Owners,
) -> tuple[torch.Size, torch.dtype]:
    """Return the shape [b, T, D] and dtype of the last stage's hidden states; all ranks call.

    Communicates one small object a rank, and waits for it.

    Args:
        own: on the last stage's ranks.
        labels: [n b, T] of a microbatch.

    Raises:
        ValueError: on every rank, hidden states that do not fit labels or rows.
    """
    told = VocabGroup.of(given.groups.vocab_group).exchange_objects(own)
    known = sorted({(tuple(each[0]), str(each[1])) for each in told if each is not None})
    shape, dtype = next(each for each in told if each is not None)
    rows = given.loss.output_weight.read().weight
    wanted = (labels.shape[0] // last.parts, *labels.shape[1:], rows.shape[1])
    casts = torch.is_autocast_enabled(rows.device.type)
    if len(known) > 1 or tuple(shape) != wanted or (dtype != rows.dtype and not casts):
        raise ValueError(
            f"the last stage must return hidden states {list(wanted)} in {rows.dtype} for a "
            f"microbatch's labels and the classifier's rows, but returns "
            f"{'; '.join(f'{list(one)} in {kind}' for one, kind in known)}: give step inputs and "
            f"labels of one length"
        )
    return torch.Size(shape), dtype
